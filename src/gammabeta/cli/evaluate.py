"""``gammabeta evaluate`` and ``gammabeta compare``: how good a run is, and how good several are."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .model import Best, lacking, tell
from .output import Device, Json, Quiet, console, print_json

if TYPE_CHECKING:
    from ..data import Split
    from ..train.evaluate import Evaluation
    from ..train.run import Run

_WORST = 24  # mistakes in the picture: four rows of six
_SHOWN = 64  # classes that are listed


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    data: Annotated[
        str | None,
        typer.Option(help="Another data set, or where the run's is now; default: the one it was trained on."),
    ] = None,
    split: Annotated[str, typer.Option(help="test, train or, where there is one, validation.")] = "test",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the pictures; default: RUN.")
    ] = None,
    best: Best = False,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Pass over pictures that cannot be read, and list them.")
    ] = False,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Judge a run on its test images, and draw the confusion matrix and the worst mistakes."""
    from ..train.load import load_dataset, load_model

    trained = load_model(run, device, best=best)
    dataset = load_dataset(trained, data, skip_damaged=skip_damaged)
    images = dataset.split(split)
    clock = time.perf_counter()
    result = trained.evaluate(images, keep_probabilities=True)
    seconds = time.perf_counter() - clock
    classes = trained.run.info.network.classes
    rows = result.by_class(classes)
    notes = [*dataset.notes, *lacking(dataset, split)]
    if json:
        document = {
            "run": str(run),
            "data": data or trained.run.info.data,
            "split": split,
            "count": result.count,
            "correct": result.correct,
            "accuracy": result.accuracy,
            "loss": result.loss,
            "by_class": rows,
            "confusion": result.confusion.tolist(),
            "classes": classes,
            "notes": notes,
            "seconds": round(seconds, 4),
        }
        with _printed(document):
            pictures = _draw(trained.run, images, result, out or run, split)
            document["pictures"] = [str(path) for path in pictures]
        return
    _print_result(result, rows, split, seconds, quiet)
    tell(notes)
    pictures = _draw(trained.run, images, result, out or run, split)  # last: the folder may be read-only
    if not quiet:
        console().print("Pictures: " + ", ".join(map(str, pictures)))


def _print_result(
    result: "Evaluation", rows: list[dict[str, Any]], split: str, seconds: float, quiet: bool
) -> None:
    screen = console()
    screen.print(f"accuracy {result.accuracy:.4f} ({result.correct:,} of {result.count:,} {split} images)")
    if not quiet:
        rate = result.count / max(seconds, 1e-9)
        screen.print(f"loss {result.loss:.4f}; {seconds:.2f} s, {rate:,.0f} images/s")
        _print_classes(rows)
        _print_confusions(result, [row["class"] for row in rows])


def _print_classes(rows: list[dict[str, Any]]) -> None:
    """Print the figures of each class; of very many classes, those that are recognised worst."""
    from rich.table import Table
    from rich.text import Text

    few = len(rows) <= _SHOWN
    worst = sorted(rows, key=lambda row: 2.0 if row["recall"] is None else row["recall"])[:_WORST]
    title = "Classes" if few else f"The {_WORST} of {len(rows):,} classes with the lowest recall"
    table = Table(title=title, title_justify="left", box=None)
    for column in ("class", "images", "correct", "predicted", "accuracy", "precision", "recall"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for row in rows if few else worst:
        counts = (f"{row[name]:,}" for name in ("count", "correct", "predicted"))
        figures = (row[name] for name in ("accuracy", "precision", "recall"))
        shares = ("–" if value is None else f"{value:.4f}" for value in figures)
        table.add_row(Text(row["class"]), *counts, *shares)
    console().print(table)


@contextmanager
def _printed(document: dict[str, Any]) -> Iterator[None]:
    """Print the figures at the end, also if the pictures cannot be written."""
    document["pictures"] = []
    try:
        yield
    finally:
        print_json(document)


def _print_confusions(result: "Evaluation", classes: list[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    off = result.confusion.clone().fill_diagonal_(0)
    worst = off.flatten().topk(min(5, off.numel()))
    pairs = [
        (int(n), *divmod(int(i), len(classes))) for n, i in zip(worst.values, worst.indices, strict=True) if n
    ]
    if not pairs:
        return
    table = Table(
        "true", "predicted", "images", title="Most frequent mistakes", title_justify="left", box=None
    )
    for count, true, guess in pairs:
        table.add_row(Text(classes[true]), Text(classes[guess]), str(count))
    console().print(table)


def _draw(run: "Run", images: "Split", result: "Evaluation", folder: Path, split: str) -> list[Path]:
    import torch

    from ..files import make_folder
    from ..train.plots import confusion, mistakes, save_figure

    make_folder(folder)
    classes = run.info.network.classes
    paths = [folder / f"confusion-{split}.png", folder / f"mistakes-{split}.png"]
    title = f"{result.accuracy:.2%} of {result.count:,} {split} images right"
    save_figure(confusion(result.confusion.numpy(), classes, title), paths[0])
    assert result.probabilities is not None  # asked for above
    labels = torch.from_numpy(images.labels)
    sure, guess = result.probabilities.max(1)
    wrong = (guess != labels).nonzero().flatten()
    worst = wrong[result.probabilities[wrong, labels[wrong]].argsort()][:_WORST]
    figure = mistakes(
        images.images[worst.numpy()],
        [classes[int(i)] for i in labels[worst]],
        [classes[int(i)] for i in guess[worst]],
        sure[worst].tolist(),
        f"The {len(worst)} worst of {len(wrong)} mistakes" if len(wrong) else "No mistakes",
    )
    save_figure(figure, paths[1])
    return paths


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
    if not json:
        _print_comparison(table)
    make_folder(out.parent)
    save_figure(curves_of_runs(opened), out)
    if json:
        print_json({"runs": table, "picture": str(out)})
        return
    console().print(f"Picture: {out}", markup=False)


def _print_comparison(table: list[dict[str, Any]]) -> None:
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
