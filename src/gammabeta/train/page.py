"""The page of a run, or of several side by side: one file with all that there is to see, nothing to fetch."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..data import Split
from ..files import write_atomically
from ..pages import embedded, figure, percent, render
from ..pages.chart import Axis, Line, chart
from .documents import warn
from .evaluate import Evaluation, worst_mistakes
from .run import Run, comparison, incomparable

PAGE = "run.html"
_WORST = 24  # mistakes that are shown
_SIDE = 96  # pixels of the longer side of a picture
_TILE = 64  # and of one in a batch
_BATCH = 32  # pictures of it
_MATRIX = 30  # classes of a confusion matrix that fits a screen
_LAYERS = 12  # whose statistics are drawn


class Shown(NamedTuple):
    """A run, and what only the data can tell."""

    run: Run
    split: str = "test"
    judged: Evaluation | None = None  # on that split, with probabilities
    images: Split | None = None  # of that split
    batch: np.ndarray | None = None  # uint8 (N, C, H, W): training images as the network was given them


def write_page(shown: Shown) -> None:
    """Write ``run.html`` into a run's folder; what goes wrong is a warning: no page is worth a training."""
    try:
        write_atomically(shown.run.path / PAGE, page([shown]).encode())
    except Exception as error:
        warn(f"the page of {shown.run.path} could not be written: {error}")


def page(runs: Sequence[Shown]) -> str:
    """Return the HTML document for one run, or for several side by side."""
    sheets = [_sheet(each) for each in runs]
    overview = _overview(runs, [sheet["rows"] for sheet in sheets]) if len(runs) > 1 else None
    title = sheets[0]["name"] if len(runs) == 1 else f"{len(runs)} runs"
    return render("run.html", title=f"gammabeta: {title}", sheets=sheets, overview=overview)


def _overview(runs: Sequence[Shown], rows: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """What the runs reached, in which settings they differ, and their curves in the same axes."""
    losses, accuracies = [], []
    for number, (each, own) in enumerate(zip(runs, rows, strict=True)):
        name = each.run.path.absolute().name
        losses.append(_curve(name, _of(own, "progress"), "loss", number))
        accuracies.append(_curve(name, _of(own, "evaluation", "test"), "accuracy", number, marks=True))
    charts = [("Training loss", losses, Axis("epochs", "loss", log=True))]
    charts.append(("Test accuracy (%)", accuracies, Axis("epochs", "accuracy", percent=True)))
    each_run = [each.run for each in runs]
    return {
        "table": comparison(each_run),
        "notes": incomparable(each_run),
        "charts": _drawn(charts),
    }


def _sheet(shown: Shown) -> dict[str, Any]:
    run, rows = shown.run, shown.run.metrics()
    info = run.info
    return {
        "name": run.path.absolute().name,
        "verdict": _verdict(shown),
        "good": info.status == "finished",
        "split": shown.split,
        "rows": rows,
        "facts": _facts(run),
        "charts": _curves(rows),
        "layers": _layers(rows),
        "classes": None if shown.judged is None else shown.judged.by_class(info.network.classes),
        "matrix": _matrix(shown),
        "mistakes": _mistakes(shown),
        "batch": None if shown.batch is None else _png(_grid(shown.batch[:_BATCH])),
        "recipe": run.recipe.model_dump().items(),
        "machine": _machine(run),
    }


def _verdict(shown: Shown) -> str:
    """What came of the training, in one line."""
    run, result = shown.run, shown.run.info.result
    if run.info.status == "failed":
        return f"Failed: {run.info.failure or 'no reason is known'}"
    if result is None:
        return "Interrupted: it can be resumed" if run.info.status == "interrupted" else "Not finished"
    seconds = result["seconds"].get("train", 0.0)
    of = f" of {shown.judged.count:,}" if shown.judged is not None and shown.split == "test" else " of the"
    epochs = f"{run.recipe.epochs:g} epoch{'' if run.recipe.epochs == 1 else 's'}"
    right = f"{percent(result['test_accuracy'])}{of} test images right"
    return f"{right}, after {epochs} and {seconds:.3g} s of training"


def _facts(run: Run) -> Iterable[tuple[str, str]]:
    info, result = run.info, run.info.result
    network = info.network
    yield "data", f"{info.data}: {len(network.classes)} classes of {network.height}×{network.width} pixels"
    if info.holdout:
        yield "judged on", f"{info.holdout:,} training images that were held out"
    yield "recipe", f"{run.recipe.name}, seed {info.seed}, {info.precision} on {info.device}"
    if result is not None:
        rate = f"{result['images_per_second']:,} a second"
        yield "images", f"{result['images']:,} in {result['steps']:,} steps, {rate}"
        yield "test", f"accuracy {figure(result['test_accuracy'])}, loss {figure(result['test_loss'])}"
        judged = result.get("train_judged", 0)
        of = f" of {judged:,} images" if judged else ""
        yield "training", f"accuracy {figure(result['train_accuracy'])}{of}, loss {figure(result['loss'])}"
        took = {name.replace("_", " "): value for name, value in result["seconds"].items() if value}
        yield "seconds", ", ".join(f"{name} {value:.2f}" for name, value in took.items())
    yield "began", f"{info.created}{f'; ended {info.finished}' if info.finished else ''}"


def _machine(run: Run) -> Iterable[tuple[str, str]]:
    made = run.info.provenance
    machine: dict[str, Any] = dict(made.get("machine", {}))
    for name, value in machine.items():
        if value not in (None, []):
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield name.replace("_", " "), shown
    if versions := made.get("versions"):
        yield "versions", ", ".join(f"{name} {number}" for name, number in versions.items())
    if commit := made.get("commit"):
        yield "commit", commit
    if command := made.get("command"):
        yield "command", " ".join(command)


# --- curves -----------------------------------------------------------------------------------------------

_Chart = tuple[str, list[Line], Axis]


def _of(rows: Sequence[dict[str, Any]], kind: str, split: str | None = None) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == kind and split in (None, row.get("split"))]


def _curve(name: str, rows: list[dict[str, Any]], key: str, colour: int = 0, *, marks: bool = False) -> Line:
    return Line(name, [row["epochs"] for row in rows], [row[key] for row in rows], colour, marks)


def _drawn(charts: Iterable[_Chart]) -> list[dict[str, Any]]:
    """Charts for the template; one without a point is left out."""
    found = ((title, lines, chart(lines, axis)) for title, lines, axis in charts)
    return [
        {"title": title, "svg": svg, "lines": [line for line in lines if line.x]}
        for title, lines, svg in found
        if svg
    ]


def _curves(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    steps = _of(rows, "progress")
    accuracies = [_curve("training, moving average", steps, "accuracy")]
    for colour, split in ((6, "train"), (2, "validation"), (1, "test")):
        judged = _of(rows, "evaluation", split)
        accuracies.append(
            _curve(
                f"{judged[-1]['count'] if judged else 0:,} {split} images",
                judged,
                "accuracy",
                colour,
                marks=True,
            )
        )
    loss, rate = (
        _curve("training, moving average", steps, "loss"),
        _curve("learning rate", steps, "learning_rate"),
    )
    charts = [("Loss", [loss], Axis("epochs", "loss", log=True))]
    charts.append(("Accuracy (%)", accuracies, Axis("epochs", "accuracy", percent=True)))
    return _drawn([*charts, ("Learning rate", [rate], Axis("epochs", "rate"))])


def _layers(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each batch-norm layer: what enters its activation, the batch's statistics, their distance."""
    measured = _of(rows, "statistics")
    first: dict[str, Any] = measured[0]["layers"] if measured else {}
    names = [name for name in first if all(name in row["layers"] for row in measured)]
    every = max(1, -(-len(names) // _LAYERS))
    x = [row["epochs"] for row in measured]
    found = []
    for name in names[::every]:
        layers = [row["layers"][name] for row in measured]
        low, median, high = zip(*(layer["percentiles"] for layer in layers), strict=True)
        own = [Line(key, x, [layer[short] for layer in layers], colour) for key, short, colour in _STATISTICS]
        entering, value = [Line("median", x, median, low=low, high=high)], Axis("epochs", "value")
        charts = [("What enters the activation: 15th, 50th and 85th percentile", entering, value)]
        charts.append(("Mean and variance of a batch", own[:2], value))
        distance = Axis("epochs", "distance")
        charts.append(("Distance of a batch from the running statistics", own[2:], distance))
        found.append({"name": name, "charts": _drawn(charts)})
    return found


_STATISTICS = (
    ("mean", "mean", 0),
    ("variance", "var", 1),
    ("mean, in standard deviations", "mean_distance", 0),
    ("ln variance", "var_distance", 1),
)


# --- what the network mistook, and what it saw ------------------------------------------------------------


def _matrix(shown: Shown) -> dict[str, Any] | None:
    """The confusion matrix, or of very many classes the pairs most often mistaken."""
    if shown.judged is None:
        return None
    names, table = shown.run.info.network.classes, shown.judged.confusion.numpy()
    wrong = table.copy()
    np.fill_diagonal(wrong, 0)
    most = max(int(wrong.max()), 1)
    if len(names) <= _MATRIX:
        rows = [
            {
                "name": name,
                "cells": [(int(count), 100 * int(off) // most) for count, off in zip(row, bad, strict=True)],
            }
            for name, row, bad in zip(names, table, wrong, strict=True)
        ]
        return {"names": names, "rows": rows}
    places = np.argsort(wrong, axis=None)[::-1][:_WORST]
    worst = zip(*np.unravel_index(places, wrong.shape), strict=True)
    pairs = [(names[row], names[column], int(wrong[row, column])) for row, column in worst]
    return {"names": [], "pairs": [pair for pair in pairs if pair[2]]}


def _mistakes(shown: Shown) -> list[dict[str, Any]] | None:
    """The pictures whose class the network thought least likely."""
    if shown.judged is None or shown.judged.probabilities is None or shown.images is None:
        return None
    names, probabilities = shown.run.info.network.classes, shown.judged.probabilities
    labels = shown.images.labels
    found = []
    for place in worst_mistakes(shown.judged, labels, _WORST)[0].tolist():
        sure, guess = probabilities[place].max(0)
        picture = _png(_small(shown.images.images[place], _SIDE))
        words = {"true": names[int(labels[place])], "said": names[int(guess)], "sure": float(sure)}
        found.append({"number": place, "picture": picture, **words})
    return found


def _small(image: np.ndarray, side: int) -> Image.Image:
    """A picture from uint8 ``(C, H, W)``, its longer side at most ``side``."""
    array = np.moveaxis(image, 0, -1) if len(image) == 3 else image[0]
    picture = Image.fromarray(np.ascontiguousarray(array))
    picture.thumbnail((side, side))
    return picture


def _grid(images: np.ndarray, columns: int = 8) -> Image.Image:
    """Pictures side by side, in rows."""
    tiles = [_small(image, _TILE) for image in images]
    width, height = tiles[0].size
    rows = -(-len(tiles) // columns)
    sheet = Image.new(tiles[0].mode, (columns * (width + 1) - 1, rows * (height + 1) - 1), 128)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        sheet.paste(tile, (column * (width + 1), row * (height + 1)))
    return sheet


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return embedded(buffer.getvalue(), "image/png")


def page_path(runs: Sequence[Path]) -> Path:
    """Where the page of runs is written if nothing else is asked for."""
    return runs[0] / PAGE if len(runs) == 1 else Path("report.html")
