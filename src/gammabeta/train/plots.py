"""Pictures as PNG: the confusion matrix, the worst mistakes, curves of runs. No training loads this."""

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
from .rate import RateRange
from .run import Run

# Okabe and Ito's colour-blind-safe palette.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_BLUE, _ORANGE, _GREEN = COLORS[:3]
_NAME = 24  # letters of a class's name, where many stand side by side


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    fit_fonts(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())


def curves_of_runs(runs: Sequence[Run]) -> Figure:
    """Draw loss and accuracy of all runs over epochs; ``UsageError`` if none has any figures yet."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    _tidy(axes)
    for number, run in enumerate(runs):
        rows = run.metrics()
        steps = [row for row in rows if row["kind"] == "progress"]
        judged = (
            [row for row in rows if row["kind"] == "evaluation" and row["split"] == "test"] if steps else []
        )
        style = {"color": COLORS[number % len(COLORS)], "label": for_figure(run.path.absolute().name)}
        for each, some, key in ((axes[0], steps, "loss"), (axes[1], judged, "accuracy")):
            # NaN leaves a gap where there is no figure.
            y = [
                float("nan") if row[key] is None else row[key] * (1 if key == "loss" else 100) for row in some
            ]
            if some:
                marks: dict[str, Any] = {"marker": "o", "clip_on": False} if key == "accuracy" else {}
                each.plot([row["epochs"] for row in some], y, **marks, **style)
    if not axes[0].lines:
        raise UsageError("none of these runs has figures yet")
    axes[0].set(xlabel="epoch", ylabel="training loss, moving average (nats)", yscale="log")
    axes[1].set(xlabel="epoch", ylabel="test accuracy (%)")
    axes[1].set_ylim(top=min(100.0, axes[1].get_ylim()[1]))
    axes[0].legend(frameon=False)
    return figure


def rate_range(found: RateRange, title: str) -> Figure:
    """Draw the loss over the learning rates of a range test."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    figure.suptitle(for_figure(title))
    axes = figure.subplots()
    _tidy([axes])
    axes.plot(found.rates, found.losses, color=_BLUE)
    axes.axvspan(found.low, found.high, color=_GREEN, alpha=0.12, label="the loss falls")
    axes.axvline(found.suggested, color=_ORANGE, label=f"suggested: {found.suggested:.2g}")
    axes.set(xlabel="learning rate", ylabel="loss (cross-entropy, nats), smoothed", xscale="log")
    axes.legend(frameon=False)
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


def seen(images: np.ndarray, lines: Sequence[tuple[str, str, bool]], title: str) -> Figure:
    """Draw images ``(K, C, H, W)`` uint8 as a network saw them; below each its name, answer and doubt."""
    words = [
        f"{for_figure(name, _NAME)}\n{for_figure(answer, _NAME)}{' ?' if doubt else ''}"
        for name, answer, doubt in lines
    ]
    colors = [_ORANGE if doubt else "black" for *_, doubt in lines]
    return _pictures(images, words, colors, title, min(8, max(4, len(images))))


def mistakes(
    images: np.ndarray, truth: Sequence[str], guess: Sequence[str], confidence: Sequence[float], title: str
) -> Figure:
    """Draw images ``(K, C, H, W)`` uint8 with what they are, what was said, and how surely (0 to 1)."""
    words = []
    for true, said, p in zip(truth, guess, confidence, strict=False):
        true, said = for_figure(true, _NAME), f"said {for_figure(said, _NAME)}"
        line = f"{true}, {said}" if len(true + said) <= _NAME else f"{true},\n{said}"
        words.append(f"{line}\n{100 * p:.1f} % sure")
    return _pictures(images, words, ["black"] * len(words), title, 6)


def _pictures(
    images: np.ndarray, words: Sequence[str], colors: Sequence[str], title: str, columns: int
) -> Figure:
    """Draw images in rows, above each its words."""
    rows = max(1, -(-len(images) // columns))
    figure = Figure(figsize=(columns * 1.6, rows * 1.95 + 0.5), layout="constrained")
    figure.suptitle(for_figure(title))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image, line, color in zip(grid.flat, images, words, colors, strict=False):
        pixels = image[0] if len(image) == 1 else np.moveaxis(image[:3], 0, -1)
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=255)
        axes.set_title(line, fontsize=8, color=color)
    return figure
