"""``gammabeta bench``: the benchmark suites, from an installed package."""

from typing import Annotated

import typer


def bench(
    context: typer.Context,
    suite: Annotated[str | None, typer.Argument(help="Which suite; none: list them.")] = None,
) -> None:
    """Measure this machine: `bench` lists the suites, `bench SUITE --help` tells a suite's options."""
    from ..bench.command import main

    chosen = [] if suite is None else [suite]
    raise typer.Exit(main([*chosen, *context.args], "gammabeta bench"))
