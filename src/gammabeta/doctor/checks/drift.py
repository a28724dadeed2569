"""Running statistics that are not those of evaluation: drifted, or taken behind dropout."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from ..evidence import Activity, Evidence, Layer
from ..finding import RECALIBRATE, Finding
from .registry import check_layers

DRIFT, TIMES, SEVERE = 0.3, 4.0, 1.0


class Drift(NamedTuple):
    """Root mean squares over channels: measured, and what chance explains."""

    mean: float
    variance: float
    chance_mean: float
    chance_variance: float


@check_layers(Evidence.updating)
def statistics_drift(layer: Layer, evidence: Evidence) -> Iterator[Finding]:
    """The running statistics are not those of the data.

    Symptom: worse in evaluation; this shows which layers cause it.
    Computation: per channel, the difference of the means over the population's standard deviation, and the
    logarithm of the ratio of the variances (both with eps); root mean square over channels. Each is compared
    with what chance explains: an exponential average of momentum m over independent batches has m/(2-m) of
    one batch's variance; the average over the loader's b batches, 1/b of it.
    Threshold: 0.3 for either, and four times what chance explains. A mean off by 0.3 standard deviations
    moves 12 % of a normal variable across zero, where a ReLU switches; 0.3 in the logarithm is about a third
    of the variance. While the weights still change, running averages lag behind in healthy models, too; at
    the end of training both stay under 0.1 in the healthy models of the fault bench. An error from 1.
    Fix: recalibrate on training data; if the data is not what the model was trained on, find out why.
    Source: Wu and Johnson (2021), section 3 (EMA against population statistics).
    """
    seen = evidence.seen(layer)
    if seen is None or seen.population.count < 2:
        return
    drift = measure(layer, seen)
    moved = drift.mean > max(DRIFT, TIMES * drift.chance_mean)
    scaled = drift.variance > max(DRIFT, TIMES * drift.chance_variance)
    if moved or scaled:
        yield Finding(
            "error" if max(drift.mean, drift.variance) > SEVERE else "warning",
            f"means are off by {drift.mean:.2g} standard deviations (chance: {drift.chance_mean:.1g}),"
            f" variances by a factor of {math.exp(min(drift.variance, 50.0)):.3g}",
            "statistics of other data, other weights, too few updates, or an unsuitable momentum",
            f"{RECALIBRATE} on training data; if only other data shows it, look at how that is prepared",
            {"mean": drift.mean, "log_variance": drift.variance},
        )


def measure(layer: Layer, seen: Activity) -> Drift:
    """How far a layer's statistics are from the population's, and how far chance alone would take them."""
    mean, var = layer.running
    eps = max(layer.eps, 1e-12)
    scale = seen.population.variance + eps
    shift = (mean - seen.population.mean) / scale.sqrt()
    ratio = (var.clamp(min=0) + eps) / (seen.population.unbiased_variance + eps)
    momentum = layer.momentum if layer.momentum is not None else 0.0
    batches = max(seen.batch_means.count, 1)
    share = momentum / (2 - momentum) + 1 / batches if momentum < 2 else 1.0
    chance_mean = seen.batch_means.unbiased_variance / scale * share
    chance_variance = seen.batch_variances.unbiased_variance / scale.square() * share
    return Drift(_rms(shift.square()), _rms(ratio.log().square()), _rms(chance_mean), _rms(chance_variance))


def _rms(squares: Tensor) -> float:
    value = math.sqrt(float(squares.mean()))
    return value if math.isfinite(value) else math.inf


SHIFT = 0.15


@check_layers(Evidence.updating)
def dropout_before_bn(layer: Layer, evidence: Evidence) -> Iterator[Finding]:
    """Dropout changes the variance that the layer learns to expect.

    Symptom: worse in evaluation, in proportion to the dropout probability.
    Computation: dropout with probability p scales what it keeps by 1/(1-p), so E[x²] grows to E[x²]/(1-p) in
    training while the mean stays. With data: the median over channels of the input's variance with dropout,
    divided by that without, both measured. Without data: predicted from the running statistics when dropout
    stands directly before the layer; in evaluation the variance is then (1-p)·var − p·mean².
    Threshold: 15 % of the variance (7 % of the scale): the noise of an average over batches of 64 is smaller.
    No finding where the running variance holds less than half of the measured shift (in the logarithm): the
    layer has been recalibrated. A note when a dropout stands before the layer, but not directly, and there is
    no data.
    Fix: move dropout after the last batch normalization, or recalibrate (the statistics are then those of
    evaluation).
    Source: Li et al. (2019), "Understanding the disharmony between dropout and batch normalization by
    variance shift", section 3.
    """
    around, seen = evidence.around(layer), evidence.seen(layer)
    if around.dropout == 0.0:
        return
    ratio, how = None, "predicted"
    if seen is not None and seen.as_trained.count:
        ratio, how = measured_shift(seen), "measured"
        if not _holds_noise(layer, seen, ratio):
            return
    elif around.dropout_direct and not layer.trivial:
        ratio = predicted_shift(layer, around.dropout)
    if ratio is None:
        yield Finding(
            "note",
            f"dropout {around.dropout:g} stands before this layer",
            "dropout shifts the variance between training and evaluation",
            "give a loader: the shift is then measured",
        )
    elif abs(ratio - 1) > SHIFT:
        yield Finding(
            "warning",
            f"{how}: the variance is {ratio:.2f} times as large in training as in evaluation",
            f"dropout {around.dropout:g} before this layer: the running variance includes its noise",
            f"move dropout after the last batch normalization, or {RECALIBRATE}",
            {"ratio": ratio, "p": around.dropout},
        )


def measured_shift(seen: Activity) -> float:
    """Median over live channels of the variance with dropout over that without."""
    live = seen.population.variance > 1e-12
    if not bool(live.any()):
        return 1.0
    return float((seen.as_trained.variance[live] / seen.population.variance[live]).median())


def _holds_noise(layer: Layer, seen: Activity, ratio: float) -> bool:
    """Whether the running variance is nearer to that of training than to that of evaluation."""
    _, var = layer.running
    live = seen.population.variance > 1e-12
    if ratio <= 0 or not bool(live.any()):
        return True
    held = float((var[live].clamp(min=1e-30) / seen.population.unbiased_variance[live]).median())
    return math.log(held) / (math.log(ratio) or 1.0) > 0.5


def predicted_shift(layer: Layer, p: float) -> float | None:
    """The same, if the running statistics were taken straight behind a dropout of probability p."""
    mean, var = layer.running
    without = (1 - p) * var - p * mean.square()
    live = without > 1e-12
    return float((var[live] / without[live]).median()) if bool(live.any()) else None
