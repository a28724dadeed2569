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
from .run import Run

# Okabe and Ito's colour-blind-safe palette.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_BLUE, _ORANGE, _GREY = COLORS[0], COLORS[1], "#777777"


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())


def curves(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """Draw loss and accuracy over epochs from the lines of ``metrics.jsonl``."""
    steps = [row for row in rows if row["kind"] == "progress"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    figure.suptitle(title)
    x = [row["epochs"] for row in steps]
    loss_axes.plot(x, [row["loss"] for row in steps], color=_BLUE, label="training, moving average")
    loss_axes.set(xlabel="epoch", ylabel="loss (cross-entropy, nats)", yscale="log")
    accuracy_axes.plot(
        x, [100 * row["accuracy"] for row in steps], color=_BLUE, label="training, moving average"
    )
    _mark_evaluations(accuracy_axes, rows)
    low = min([90.0, *(100 * row["accuracy"] for row in steps[len(steps) // 4 :])])
    accuracy_axes.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(max(low - 1, 0), 100.2))
    _tidy((loss_axes, accuracy_axes))
    for axes in (loss_axes, accuracy_axes):
        axes.legend(frameon=False)
    return figure


def curves_of_runs(runs: Sequence[Run]) -> Figure:
    """Draw loss and accuracy of all runs over epochs.

    Raises:
        UsageError: None of the runs has got so far as to have figures.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    drawn = 0
    for number, run in enumerate(runs):
        metrics = run.metrics()
        steps = [row for row in metrics if row["kind"] == "progress"]
        judged = [row for row in metrics if row["kind"] == "evaluation" and row["split"] == "test"]
        if not steps:
            continue
        drawn += 1
        style: dict[str, Any] = {"color": COLORS[number % len(COLORS)], "label": run.path.name}
        loss_axes.plot([row["epochs"] for row in steps], [row["loss"] for row in steps], **style)
        accuracy_axes.plot(
            [row["epochs"] for row in judged], [100 * row["accuracy"] for row in judged], marker="o", **style
        )
    if not drawn:
        raise UsageError("none of these runs has figures yet")
    loss_axes.set(xlabel="epoch", ylabel="training loss, moving average (nats)", yscale="log")
    accuracy_axes.set(xlabel="epoch", ylabel="test accuracy (%)")
    loss_axes.legend(frameon=False)
    _tidy((loss_axes, accuracy_axes))
    return figure


def _mark_evaluations(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    for split, color, marker in (("train", _GREY, "s"), ("test", _ORANGE, "o")):
        judged = [row for row in rows if row["kind"] == "evaluation" and row["split"] == split]
        if not judged:
            continue
        x, y = [row["epochs"] for row in judged], [100 * row["accuracy"] for row in judged]
        label = f"all {judged[-1]['count']:,} {split} images: {y[-1]:.2f} %"
        axes.plot(x, y, color=color, marker=marker, label=label, linewidth=1)


def statistics(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """Draw each batch-norm layer's statistics over epochs from the lines of ``metrics.jsonl``."""
    rows = [row for row in rows if row["kind"] == "statistics"]
    names = list(rows[0]["layers"])
    figure = Figure(figsize=(max(3.3 * len(names), 5), 8), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(3, len(names), squeeze=False, sharex=True)
    x = [row["epochs"] for row in rows]
    for column, name in enumerate(names):
        _statistics_of_layer(list(grid[:, column]), name, x, [row["layers"][name] for row in rows])
    labels = ("input of the activation", "batch, mean over channels", "distance from running values")
    for axes, label in zip(grid[:, 0], labels, strict=True):
        axes.set_ylabel(label)
        axes.legend(frameon=False, fontsize=8)
    _tidy(grid.flat)
    return figure


def _statistics_of_layer(
    column: Sequence[Axes], name: str, x: Sequence[float], layers: Sequence[dict[str, Any]]
) -> None:
    top, middle, bottom = column
    top.set_title(name)
    low, median, high = zip(*(layer["percentiles"] for layer in layers), strict=True)
    top.fill_between(x, low, high, color=_BLUE, alpha=0.2, label="15th to 85th percentile")
    top.plot(x, median, color=_BLUE, label="median")
    middle.plot(x, [layer["mean"] for layer in layers], color=_BLUE, label="mean")
    middle.plot(x, [layer["var"] for layer in layers], color=_ORANGE, label="variance")
    for key, color, label in (("mean_distance", _BLUE, "mean"), ("var_distance", _ORANGE, "ln variance")):
        if layers[0][key] is not None:
            bottom.plot(x, [layer[key] for layer in layers], color=color, label=label)
    bottom.set_xlabel("epoch")
    bottom.set_ylim(bottom=0)


def _tidy(many: Iterable[Axes]) -> None:
    """Give axes a quiet grid and no frame above and to the right."""
    for axes in many:
        axes.grid(color="#dddddd", linewidth=0.6, which="both")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)


def confusion(table: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """Draw a confusion matrix, int64 ``(classes, classes)``, rows true; small ones show the counts."""
    count = len(classes)
    side = min(max(5.0, 0.55 * count), 20.0)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    mistakes = table.astype(float).copy()
    np.fill_diagonal(mistakes, np.nan)
    axes.imshow(mistakes, cmap="Oranges", vmin=0, vmax=max(np.nanmax(mistakes), 1.0))
    axes.set(title=title, xlabel="predicted", ylabel="true")
    axes.set_xticks(range(count), classes, rotation=90 if max(map(len, classes)) > 2 else 0)
    axes.set_yticks(range(count), classes)
    if count <= 30:
        dark = 0.6 * max(np.nanmax(mistakes), 1.0)
        for row, column in np.argwhere(table > 0):
            weight = "bold" if row == column else "normal"
            color = "white" if row != column and table[row, column] > dark else "black"
            shown = f"{table[row, column]}"
            axes.text(column, row, shown, ha="center", va="center", fontsize=8, weight=weight, color=color)
    return figure


def mistakes(
    images: np.ndarray, truth: Sequence[str], guess: Sequence[str], confidence: Sequence[float], title: str
) -> Figure:
    """Draw images ``(K, C, H, W)`` uint8 with what they are, what was said, and how surely (0 to 1)."""
    columns = 6
    rows = max(1, -(-len(images) // columns))
    figure = Figure(figsize=(columns * 1.6, rows * 1.95 + 0.5), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image, true, said, p in zip(grid.flat, images, truth, guess, confidence, strict=False):
        axes.imshow(
            image[0] if len(image) == 1 else np.moveaxis(image[:3], 0, -1), cmap="gray", vmin=0, vmax=255
        )
        axes.set_title(f"{true}, said {said}\n{100 * p:.1f} % sure", fontsize=8)
    return figure
