"""The report's plots, each an SVG in a string. Nothing else in the doctor loads Matplotlib."""

import io
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..text import fit_fonts, for_figure
from .evidence import BINS, REACH, Activity, Layer
from .summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, INK = "#2f6fb5", "#d9722b", "#9aa3ad", "#2b3036"
PANELS, CHANNELS = 12, 128
NAME = 40  # letters of a layer's name


def plots(report: Summary) -> Iterator[tuple[str, str, str]]:
    """(title, explanation, svg) for everything that the evidence allows to draw."""
    gap = report.evidence.gap
    if gap is not None and gap.losses is not None:
        yield (
            "Where the loss in evaluation comes from",
            "The same data in four modes. Noise and stale statistics are batch normalization's part.",
            _svg(_gap_figure(gap.train, *gap.losses)),
        )
    pairs = ((layer, report.evidence.seen(layer)) for layer in report.evidence.stored())
    compared = [(layer, seen) for layer, seen in pairs if seen is not None]
    if compared:
        yield (
            "Running against true statistics",
            "One dot per channel, layers in order of registration; all dots should lie on the line.",
            _svg(_statistics_figure(compared)),
        )
        yield (
            "What each layer's input looks like after normalization",
            "The first batch, standardised by the running statistics and by its own: both should"
            " agree. The worst layers first.",
            _svg(_histogram_figure(compared, report)),
        )


Compared = list[tuple[Layer, Activity]]


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(GREY)
        axis.tick_params(colors=INK, labelsize=8)
    return figure, axes


def _svg(figure: "Figure") -> str:
    from matplotlib import rc_context

    fit_fonts(figure)
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "gammabeta", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _gap_figure(train: float | None, bn_train: float, population: float, evaluation: float) -> "Figure":
    """One bar per mode; the last is stacked from the one with batch statistics."""
    figure, axes = _figure(7.5, 2.3)
    axis: Axes = axes[0, 0]
    modes = {
        "everything in training": train,
        "batch normalization in training": bn_train,
        "evaluation, exact statistics": population,
        "evaluation, as is": evaluation,
    }
    losses = {mode: loss for mode, loss in modes.items() if loss is not None}
    last = len(losses) - 1
    left = min(bn_train, population, evaluation) if math.isfinite(evaluation) else 0.0
    axis.barh(range(len(losses)), [*list(losses.values())[:last], left], color=GREY, height=0.62)
    parts = (
        (population - bn_train, ORANGE, "batch noise"),
        (evaluation - population, BLUE, "stale statistics"),
    )
    for value, colour, label in parts:
        if 0 < value < math.inf:
            axis.barh(last, value, left=left, color=colour, height=0.62, label=f"{label} {value:+.3g}")
            left += value
    axis.set_yticks(range(len(losses)), list(losses))
    for index, loss in enumerate(losses.values()):
        end = left if index == last else loss
        axis.annotate(f" {loss:.4g}", (end, index), va="center", fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("loss", fontsize=8, color=INK)
    axis.margins(x=0.14)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)
    return figure


def _statistics_figure(compared: Compared) -> "Figure":
    figure, axes = _figure(9.5, 4.6, rows=2)
    upper: Axes = axes[0, 0]
    lower: Axes = axes[1, 0]
    for index, (layer, seen) in enumerate(compared):
        mean, var = layer.running
        true_var = seen.population.unbiased_variance + layer.eps
        means = ((mean - seen.population.mean) / true_var.sqrt()).numpy()
        ratios = ((var.clamp(min=0) + layer.eps) / true_var).log2().numpy()
        for axis, values in ((upper, means), (lower, ratios)):
            shown = values[np.linspace(0, len(values) - 1, min(len(values), CHANNELS)).astype(int)]
            shown = np.nan_to_num(shown, nan=0.0, posinf=64.0, neginf=-64.0)
            place = index + np.linspace(-0.3, 0.3, len(shown))
            axis.plot(place, shown, "o", color=BLUE, markersize=3.2, alpha=0.6, markeredgewidth=0)
    panels = (
        (upper, "running − true mean\n(standard deviations)", 0.5),
        (lower, "log₂ of running\nover true variance", 1.0),
    )
    names = [for_figure(layer.label, NAME) for layer, _ in compared]
    step = math.ceil(len(names) / 24)
    for axis, label, least in panels:
        axis.axhline(0, color=INK, linewidth=0.8)
        reach = max(least, *(abs(limit) for limit in axis.get_ylim()))
        axis.set_ylim(-reach, reach)
        if reach > 20:
            axis.set_yscale("symlog", linthresh=1.0)
        axis.set_ylabel(label, fontsize=8, color=INK)
        axis.set_xlim(-0.6, len(compared) - 0.4)
    upper.set_xticks(range(0, len(names), step), [])
    lower.set_xticks(range(0, len(names), step), names[::step], rotation=30, ha="right")
    return figure


def _histogram_figure(compared: Compared, report: Summary) -> "Figure":
    def severity(pair: tuple[Layer, Activity]) -> float:
        row = report.layer_row(pair[0])
        return -((row["drift_mean"] or 0.0) + (row["drift_log_variance"] or 0.0))

    worst = sorted((pair for pair in compared if pair[1].histogram is not None), key=severity)[:PANELS]
    columns = min(4, max(len(worst), 1))
    rows = max(1, math.ceil(len(worst) / columns))
    figure, axes = _figure(2.4 * columns + 0.3, 1.7 * rows + 0.5, rows, columns)
    edges = np.linspace(-REACH, REACH, BINS + 1)
    for axis in axes.flat[len(worst) :]:
        axis.set_visible(False)
    for axis, (layer, seen) in zip(axes.flat, worst, strict=False):
        assert seen.histogram is not None  # chosen above
        running, own = (counts.numpy() / max(float(counts.sum()), 1.0) for counts in seen.histogram)
        axis.stairs(running, edges, fill=True, color=BLUE, alpha=0.45, label="by running statistics")
        axis.stairs(own, edges, color=ORANGE, linewidth=1.3, label="by its own")
        axis.set_title(for_figure(layer.label, NAME), fontsize=8, color=INK)
        axis.set_yticks([])
        axis.set_xticks([-4, 0, 4])
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", frameon=False, fontsize=8, ncols=2)
    return figure
