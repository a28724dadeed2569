"""``gammabeta evaluate`` and ``gammabeta compare``: how good a run is, and how good several are."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .model import Best, lacking, tell
from .output import Device, Json, Quiet, console, print_json, share

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
    model: Annotated[
        str | None, typer.Option(help="module:function again, of a run whose network it made.")
    ] = None,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Pass over pictures that cannot be read, and list them.")
    ] = False,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Judge a run on its test images, and draw the confusion matrix and the worst mistakes."""
    from ..train.given import made_by
    from ..train.judge import judge
    from ..train.load import load_model

    found = load_model(run, device, best=best, given=None if model is None else made_by(model))
    trained, dataset, images, result, seconds = judge(found, data, split, skip_damaged=skip_damaged)
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
            "pictures": [],
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
    screen.print(f"accuracy {share(result.accuracy)} ({result.correct:,} of {result.count:,} {split} images)")
    if not quiet:
        rate = result.count / max(seconds, 1e-9)
        screen.print(f"loss {result.loss:.4f}; {seconds:.2f} s, {rate:,.0f} images/s")
        _print_classes(rows)
        _print_confusions(result, [row["class"] for row in rows])


def _print_classes(rows: list[dict[str, Any]]) -> None:
    """Print the figures of each class; of very many classes, those that are recognised worst."""
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
        table.add_row(row["class"], *counts, *shares)
    console().print(table)


@contextmanager
def _printed(document: dict[str, Any]) -> Iterator[None]:
    """Print the figures at the end, also if the pictures cannot be written."""
    try:
        yield
    finally:
        print_json(document)


def _print_confusions(result: "Evaluation", classes: list[str]) -> None:
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
        table.add_row(classes[true], classes[guess], str(count))
    console().print(table)


def _draw(run: "Run", images: "Split", result: "Evaluation", folder: Path, split: str) -> list[Path]:
    from ..files import make_folder
    from ..train.evaluate import worst_mistakes
    from ..train.plots import confusion, mistakes, save_figure

    make_folder(folder)
    classes = run.info.network.classes
    paths = [folder / f"confusion-{split}.png", folder / f"mistakes-{split}.png"]
    title = f"{result.accuracy:.2%} of {result.count:,} {split} images right"
    save_figure(confusion(result.confusion.numpy(), classes, title), paths[0])
    assert result.probabilities is not None  # asked for above
    worst, many = worst_mistakes(result, images.labels, _WORST)
    sure, guess = result.probabilities[worst].max(1)
    figure = mistakes(
        images.images[worst.numpy()],
        [classes[int(i)] for i in images.labels[worst.numpy()]],
        [classes[int(i)] for i in guess],
        sure.tolist(),
        f"The {len(worst)} worst of {many} mistakes" if many else "No mistakes",
    )
    save_figure(figure, paths[1])
    return paths


def report(
    runs: Annotated[list[Path], typer.Argument(help="One run folder, or several to see side by side.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The page; default: RUN/run.html, or report.html for several."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Where the runs' data are now.")] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Write a page on runs: curves, statistics, mistakes, settings, all in one file."""
    from ..files import write_atomically
    from ..train.judge import shown
    from ..train.page import page, page_path
    from .model import check_folder

    if out is not None:
        check_folder(out, "--out")
    seen = [shown(run, data, device) for run in runs]
    out = out or page_path(runs)
    write_atomically(out, page(seen).encode())
    if json:
        print_json({"page": str(out), "runs": [str(run) for run in runs]})
    else:
        console().print(f"Page: {out}", markup=False)


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two or more run folders.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture.")] = Path("comparison.png"),
    json: Json = False,
) -> None:
    """Compare runs: what they reached, in which settings they differ, and their curves in one picture."""
    from ..files import make_folder
    from ..train.plots import curves_of_runs, save_figure
    from ..train.run import Run, comparison, incomparable

    opened = [Run.open(path) for path in runs]
    table, notes = comparison(opened), incomparable(opened)
    document: dict[str, Any] = {"runs": table, "notes": notes, "picture": None}
    if not json:
        _print_comparison(table)
        tell(notes)
    with _printed(document) if json else nullcontext():
        make_folder(out.parent)
        save_figure(curves_of_runs(opened), out)
        document["picture"] = str(out)
    if not json:
        console().print(f"Picture: {out}", markup=False)


def _print_comparison(table: list[dict[str, Any]]) -> None:
    screen = console()
    figures = Table("", "run", "status", "test", "train", "test loss", "loss", "seconds", box=None)
    for number, row in enumerate(table, 1):
        shares = [share(row[name]) for name in ("test_accuracy", "train_accuracy")]
        values = [row["test_loss"], row["loss"], row["train_seconds"]]
        shown = ["–" if value is None else f"{value:.4f}" for value in values]
        figures.add_row(str(number), row["run"], row["status"], *shares, *shown)
    screen.print(figures)
    settings = Table("differs", *map(str, range(1, len(table) + 1)), box=None)
    for field in table[0]["settings"]:
        settings.add_row(field, *(str(row["settings"][field]) for row in table))
    if settings.row_count:
        screen.print(settings)
