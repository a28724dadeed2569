"""``gammabeta compare``: runs side by side, as a table and a picture."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .output import Json, console, print_json


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two or more run folders.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture.")] = Path("comparison.png"),
    json: Json = False,
) -> None:
    """Compare runs: what they reached, in which settings they differ, and their curves in one picture."""
    from ..files import make_folder
    from ..train.plots import curves_of_runs, save_figure
    from ..train.run import Run, comparison

    opened = [Run.open(path) for path in runs]
    table = comparison(opened)
    make_folder(out.parent)
    save_figure(curves_of_runs(opened), out)
    if json:
        print_json({"runs": table, "picture": str(out)})
        return
    _print(table)
    console().print(f"Picture: {out}", markup=False)


def _print(table: list[dict[str, Any]]) -> None:
    from rich.table import Table

    screen = console()
    figures = Table("", "run", "status", "test", "train", "loss", "seconds", box=None)
    for number, row in enumerate(table, 1):
        values = [row["test_accuracy"], row["train_accuracy"], row["loss"], row["train_seconds"]]
        shown = ["–" if value is None else f"{value:.4f}" for value in values]
        figures.add_row(str(number), row["run"], row["status"], *shown)
    screen.print(figures)
    settings = Table("differs", *map(str, range(1, len(table) + 1)), box=None)
    for field in table[0]["settings"]:
        settings.add_row(field, *(str(row["settings"][field]) for row in table))
    if settings.row_count:
        screen.print(settings)
