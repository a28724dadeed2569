"""Dropout before batch normalization."""

from __future__ import annotations

from collections.abc import Iterator

from ..evidence import Activity, Evidence, Layer
from ..finding import Finding
from .registry import check

SHIFT = 0.15


@check
def dropout_before_bn(evidence: Evidence) -> Iterator[Finding]:
    """Dropout changes the variance that the layer learns to expect.

    Symptom: worse in evaluation, in proportion to the dropout probability.
    Computation: dropout with probability p scales what it keeps by 1/(1-p), so E[x²] grows to E[x²]/(1-p) in
    training while the mean stays. With data: the median over channels of the input's variance with dropout,
    divided by that without, both measured. Without data: predicted from the running statistics when dropout
    stands directly before the layer; in evaluation the variance is then (1-p)·var − p·mean².
    Threshold: 15 % of the variance (7 % of the scale): the noise of an average over batches of 64 is smaller.
    A note when a dropout stands before the layer, but not directly, and there is no data.
    Fix: move dropout after the last batch normalization, or recalibrate (the statistics are then those of
    evaluation).
    Source: Li et al. (2019), "Understanding the disharmony between dropout and batch normalization by
    variance shift", section 3.
    """
    for layer in evidence.updating():
        around, seen = evidence.around(layer), evidence.seen(layer)
        ratio: float | None
        if around.dropout == 0.0:
            continue
        if seen is not None and seen.as_trained.count:
            ratio, how = measured_shift(seen), "measured"
        elif around.dropout_direct and not layer.trivial:
            ratio, how = predicted_shift(layer, around.dropout), "predicted"
        else:
            ratio, how = None, ""
        if ratio is None:
            yield Finding(
                "dropout-before-bn",
                layer.name,
                "note",
                f"dropout {around.dropout:g} stands before this layer",
                "dropout shifts the variance between training and evaluation",
                "give a loader: the shift is then measured",
            )
        elif abs(ratio - 1) > SHIFT:
            yield Finding(
                "dropout-before-bn",
                layer.name,
                "warning",
                f"{how}: the variance is {ratio:.2f} times as large in training as in evaluation",
                f"dropout {around.dropout:g} before this layer: the running variance includes its noise",
                "move dropout after the last batch normalization, or recalibrate",
                {"ratio": ratio, "p": around.dropout},
            )


def measured_shift(seen: Activity) -> float:
    """Median over live channels of the variance with dropout over that without."""
    live = seen.population.variance > 1e-12
    if not bool(live.any()):
        return 1.0
    return float((seen.as_trained.variance[live] / seen.population.variance[live]).median())


def predicted_shift(layer: Layer, p: float) -> float | None:
    """The same, if the running statistics were taken straight behind a dropout of probability p."""
    mean, var = layer.running
    without = (1 - p) * var - p * mean.square()
    live = without > 1e-12
    return float((var[live] / without[live]).median()) if bool(live.any()) else None
