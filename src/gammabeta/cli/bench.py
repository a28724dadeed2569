"""``gammabeta bench``: what convert and fold gain on a model, measured here."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from .model import Model, Name, Weights, find_model, running
from .output import Device, Json, Quiet, Screen, console, print_json

if TYPE_CHECKING:
    from torch import Tensor

    from ..measure.report import BenchmarkReport


def bench(
    model: Name,
    input_: Annotated[
        str | None,
        typer.Option(
            "--input",
            "-i",
            help="Such as 8x3x224x224, batch first; default for a run: as it was trained.",
        ),
    ] = None,
    weights: Weights = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="For all timed rounds; preparing and compiling come on top.")
    ] = 30.0,
    training: Annotated[bool, typer.Option(help="Also time training steps.")] = True,
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Leave out compile (torch.compile) or onnx (ONNX Runtime)."),
    ] = None,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Time a model as it is, converted and folded, and say what is to be gained.

    gammabeta bench models:make --input 8x3x224x224

    Results are compared before anything is timed. A way that gives others, or cannot be had, says why. The
    model's files stay as they are.
    """
    from ..measure.benchmark import benchmark
    from ..measure.variants import BESIDE

    if unknown := [name for name in without or [] if name not in BESIDE]:
        raise UsageError(f"--without takes {' or '.join(BESIDE)}, not {unknown[0]!r}")
    subject = find_model(model, weights, device)
    example = _input(subject, input_)
    screen = console(json)
    with _shown(console(True), quiet=quiet or json) as progress, running(subject.name):
        report = benchmark(
            subject.module,
            example,
            training=training,
            beside=[name for name in BESIDE if name not in (without or [])],
            seconds=seconds,
            progress=progress,
        )
    sizes = "x".join(map(str, example.shape))
    if json:
        print_json({"model": model, "input": sizes, "device": str(subject.device), **report.to_dict()})
    elif quiet:
        screen.print(report.advice)
    else:
        _print(screen, subject, sizes, report)


def _input(subject: Model, sizes: str | None) -> "Tensor":
    """A random input of the sizes asked for; for a run, of its images and its batch size."""
    import torch

    if sizes is None:
        if subject.trained is None:
            raise UsageError("say the input's sizes with --input, batch first, such as --input 8x3x224x224")
        network, recipe = subject.trained.run.info.network, subject.trained.run.recipe
        shape: tuple[int, ...] = (recipe.batch_size, network.channels, network.height, network.width)
    else:
        parts = sizes.lower().replace(",", "x").split("x")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise UsageError(f"--input is sizes joined by x, batch first, such as 8x3x224x224, not {sizes!r}")
        shape = tuple(map(int, parts))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(subject.device)


@contextmanager
def _shown(screen: Screen, *, quiet: bool) -> Iterator[Callable[[str, float | None], None]]:
    """Show what is being done, with a bar where its length is known."""
    from rich.progress import BarColumn, Progress, TimeElapsedColumn

    columns: Any = ("{task.description}", BarColumn(bar_width=20), TimeElapsedColumn())
    with Progress(*columns, console=screen, disable=quiet or not screen.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(what: str, done: float | None) -> None:
            bar.update(task, description=what, total=None if done is None else 1.0, completed=done or 0)

        yield show


def _print(screen: Screen, subject: Model, sizes: str, report: "BenchmarkReport") -> None:
    from rich.table import Table

    from ..measure.report import HEAD
    from ..train.provenance import processor

    place = processor() if subject.device.type == "cpu" else str(subject.device)
    norms = f"{report.norms} batch norm{'s' * (report.norms != 1)}"
    share = "" if report.share is None else f", {report.share:.0%} of a training step"
    screen.print(f"{subject.name}, input {sizes}, {place}, {report.threads} threads; {norms}{share}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in HEAD[1:]:
        right = name in ("time", "times as fast", "spread", "kept")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    last = ""
    for task, *cells in report.cells():
        if task != last:
            table.add_row(task, style="bold")
            last = task
        table.add_row(f"  {cells[0]}", *cells[1:])
    screen.print(table)
    screen.print(report.advice)
