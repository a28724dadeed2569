"""Pictures of a training: curves, the confusion matrix, the worst mistakes; curves of several runs."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..errors import UsageError
from ..files import write_atomically
from ..text import fit_fonts, for_figure
from .run import Run

# Okabe and Ito's colour-blind-safe palette.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_BLUE, _ORANGE, _GREEN, _GREY = *COLORS[:3], "#777777"
_NAME = 24  # letters of a class's name, where many stand side by side


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    fit_fonts(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())


def curves(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """Draw loss and accuracy over epochs from the lines of ``metrics.jsonl``."""
    figure, loss_axes, accuracy_axes = _loss_and_accuracy(height=4)
    figure.suptitle(for_figure(title))
    steps = _rows(rows, "progress")
    style: dict[str, Any] = {"color": _BLUE, "label": "training, moving average"}
    _line(loss_axes, steps, "loss", **style)
    _line(accuracy_axes, steps, "accuracy", **style)
    for split, color, marker in (("train", _GREY, "s"), ("validation", _GREEN, "^"), ("test", _ORANGE, "o")):
        if judged := _rows(rows, "evaluation", split):
            last = judged[-1]
            label = f"all {last['count']:,} {split} images: {100 * _number(last['accuracy']):.2f} %"
            _line(accuracy_axes, judged, "accuracy", color=color, marker=marker, label=label, linewidth=1)
    seen = [row["accuracy"] for row in steps[len(steps) // 4 :] if row["accuracy"] is not None]
    low = min([90.0, *(100 * accuracy for accuracy in seen)])
    loss_axes.set(ylabel="loss (cross-entropy, nats)")
    accuracy_axes.set(ylabel="accuracy (%)", ylim=(max(low - 1, 0), 100.2))
    for axes in (loss_axes, accuracy_axes):
        axes.legend(frameon=False)
    return figure


def curves_of_runs(runs: Sequence[Run]) -> Figure:
    """Draw loss and accuracy of all runs over epochs; ``UsageError`` if none has any figures yet."""
    figure, loss_axes, accuracy_axes = _loss_and_accuracy(height=4.2)
    for number, run in enumerate(runs):
        rows = run.metrics()
        if steps := _rows(rows, "progress"):
            style: dict[str, Any] = {
                "color": COLORS[number % len(COLORS)],
                "label": for_figure(run.path.absolute().name),
            }
            _line(loss_axes, steps, "loss", **style)
            _line(accuracy_axes, _rows(rows, "evaluation", "test"), "accuracy", marker="o", **style)
    if not loss_axes.lines:
        raise UsageError("none of these runs has figures yet")
    loss_axes.set(ylabel="training loss, moving average (nats)")
    accuracy_axes.set(ylabel="test accuracy (%)")
    loss_axes.legend(frameon=False)
    return figure


def _rows(rows: Sequence[dict[str, Any]], kind: str, split: str | None = None) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == kind and split in (None, row.get("split"))]


def _loss_and_accuracy(height: float) -> tuple[Figure, Axes, Axes]:
    figure = Figure(figsize=(10, height), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    _tidy((loss_axes, accuracy_axes))
    loss_axes.set(xlabel="epoch", yscale="log")
    accuracy_axes.set(xlabel="epoch")
    return figure, loss_axes, accuracy_axes


def _line(axes: Axes, rows: Sequence[dict[str, Any]], figure: str, **style: Any) -> None:
    """Draw a figure over epochs; the accuracy in percent."""
    scale = 100 if figure == "accuracy" else 1
    axes.plot([row["epochs"] for row in rows], [scale * _number(row[figure]) for row in rows], **style)


def _number(figure: float | None) -> float:
    """A figure as it is drawn; NaN leaves a gap where there is none."""
    return float("nan") if figure is None else figure


def statistics(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """Draw each batch-norm layer's statistics over epochs from the lines of ``metrics.jsonl``."""
    rows = _rows(rows, "statistics")
    names = [name for name in rows[0]["layers"] if all(name in row["layers"] for row in rows)]
    figure = Figure(figsize=(max(3.3 * len(names), 5), 8), layout="constrained")
    figure.suptitle(for_figure(title))
    grid = figure.subplots(3, len(names), squeeze=False, sharex=True)
    x = [row["epochs"] for row in rows]
    for (top, middle, bottom), name in zip(grid.T, names, strict=True):
        layers = [row["layers"][name] for row in rows]
        top.set_title(for_figure(name))
        low, median, high = zip(*(map(_number, layer["percentiles"]) for layer in layers), strict=True)
        top.fill_between(x, low, high, color=_BLUE, alpha=0.2, label="15th to 85th percentile")
        top.plot(x, median, color=_BLUE, label="median")
        for axes, key, color, label in (
            (middle, "mean", _BLUE, "mean"),
            (middle, "var", _ORANGE, "variance"),
            (bottom, "mean_distance", _BLUE, "mean"),
            (bottom, "var_distance", _ORANGE, "ln variance"),
        ):
            if layers[0][key] is not None:
                axes.plot(x, [_number(layer[key]) for layer in layers], color=color, label=label)
        bottom.set_xlabel("epoch")
        bottom.set_ylim(bottom=0)
    labels = ("input of the activation", "batch, mean over channels", "distance from running values")
    for axes, label in zip(grid[:, 0], labels, strict=True):
        axes.set_ylabel(label)
        axes.legend(frameon=False, fontsize=8)
    _tidy(grid.flat)
    return figure


def _tidy(many: Iterable[Axes]) -> None:
    """Give axes a quiet grid and no frame above and to the right."""
    for axes in many:
        axes.grid(color="#dddddd", linewidth=0.6, which="both")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)


def confusion(table: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """Draw a confusion matrix, int64 ``(classes, classes)``, rows true; small ones show the counts."""
    count = len(classes)
    names = [for_figure(name, _NAME) for name in classes]
    side = min(max(5.0, 0.55 * count), 20.0)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    mistakes = table.astype(float)
    np.fill_diagonal(mistakes, np.nan)
    most = max(np.nanmax(mistakes), 1.0)
    axes.imshow(mistakes, cmap="Oranges", vmin=0, vmax=most)
    axes.set(title=for_figure(title), xlabel="predicted", ylabel="true")
    axes.set_xticks(range(count), names, rotation=90 if max(map(len, names)) > 2 else 0)
    axes.set_yticks(range(count), names)
    centred: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8}
    if count <= 30:
        for row, column in np.argwhere(table > 0):
            weight = "bold" if row == column else "normal"
            color = "white" if row != column and table[row, column] > 0.6 * most else "black"
            axes.text(column, row, str(table[row, column]), weight=weight, color=color, **centred)
    return figure


def mistakes(
    images: np.ndarray, truth: Sequence[str], guess: Sequence[str], confidence: Sequence[float], title: str
) -> Figure:
    """Draw images ``(K, C, H, W)`` uint8 with what they are, what was said, and how surely (0 to 1)."""
    columns = 6
    rows = max(1, -(-len(images) // columns))
    figure = Figure(figsize=(columns * 1.6, rows * 1.95 + 0.5), layout="constrained")
    figure.suptitle(for_figure(title))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image, true, said, p in zip(grid.flat, images, truth, guess, confidence, strict=False):
        axes.imshow(
            image[0] if len(image) == 1 else np.moveaxis(image[:3], 0, -1), cmap="gray", vmin=0, vmax=255
        )
        true, said = for_figure(true, _NAME), f"said {for_figure(said, _NAME)}"
        words = f"{true}, {said}" if len(true + said) <= _NAME else f"{true},\n{said}"
        axes.set_title(f"{words}\n{100 * p:.1f} % sure", fontsize=8)
    return figure
