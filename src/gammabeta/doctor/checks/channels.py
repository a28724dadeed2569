"""Single channels: switched off, constant, almost without variance, or with far too much."""

from collections.abc import Iterator

from torch import Tensor

from ..evidence import Evidence, Layer
from ..finding import Finding, Severity
from .registry import check_layers

FEW = 0.1


def _severity(count: int, layer: Layer) -> Severity:
    """A note where few of the layer's channels are concerned."""
    return "warning" if count >= FEW * layer.channels else "note"


PEERS, ABSOLUTE, SIGMAS = 1e-3, 1e-6, 4.0


@check_layers()
def dead_gamma(layer: Layer, evidence: Evidence) -> Iterator[Finding]:
    """Channels that γ and β switch off.

    Symptom: channels that cost time and memory, and have no effect.
    Computation: |γ| below a thousandth of the layer's median, or the whole layer below 1e-6; and, where a
    ReLU follows, β/|γ| below -4 (always off) or above 4 (always on: the ReLU does nothing).
    Threshold: a thousandth is below half precision's resolution (2^-11) of its peers. A normal variable
    exceeds four standard deviations once in 30000 values. A note under 10 % of the channels, since weight
    decay and sparsity penalties do this on purpose; a warning from there. Always on is a note.
    Fix: prune the channels; check weight decay on γ; for whole layers, check whether γ started at 0 (as in
    the last layer of a residual branch) and never learned.
    Source: Liu et al. (2017), "Network slimming": small γ marks a channel without effect.
    """
    if layer.weight is None:
        return
    size = layer.weight.abs()
    usual = float(size.median())
    dead = size <= (ABSOLUTE if usual <= ABSOLUTE else PEERS * usual)
    count = int(dead.sum())
    if count:
        yield Finding(
            _severity(count, layer),
            f"γ is almost 0 in {count} of {layer.channels} channels (median {usual:.1e})",
            "weight decay or a sparsity penalty on γ; or γ = 0 at the start and never learned",
            "prune the channels, or exempt γ from weight decay",
            {"channels": count},
        )
    if layer.bias is not None and evidence.around(layer).relu_after:
        yield from _relus(layer, (layer.bias / size.clamp(min=1e-30))[~dead])


def _relus(layer: Layer, ratio: Tensor) -> Iterator[Finding]:
    off, on = int((ratio < -SIGMAS).sum()), int((ratio > SIGMAS).sum())
    if off:
        yield Finding(
            _severity(off, layer),
            f"β is more than {SIGMAS:g}·|γ| below zero in {off} of {layer.channels} channels:"
            " the ReLU after it is always off",
            "a learning rate so large that β moved far away, or inputs that have changed",
            "prune the channels, or restart them with β = 0",
            {"off": off},
        )
    if on:
        yield Finding(
            "note",
            f"β is more than {SIGMAS:g}·|γ| above zero in {on} of {layer.channels} channels:"
            " the ReLU after it does nothing",
            "channels that pass a linear signal on",
            "nothing",
            {"on": on},
        )


@check_layers(Evidence.stored)
def collapsed_variance(layer: Layer, evidence: Evidence) -> Iterator[Finding]:
    """Running variances under ``eps``.

    Symptom: channels that carry no signal; or whose smallest change is magnified by up to 1/sqrt(eps), about
    300.
    Computation: channels whose running variance is below ``eps``.
    Threshold: at ``eps`` the divisor sqrt(var + eps) is already sqrt(2) too large, below it ``eps`` decides
    alone. A few dead channels are common in trained networks: a note under 10 % of the layer's channels, a
    warning from there.
    Fix: prune the channels, repair the initialisation before them, or scale the input.
    Source: Ioffe and Szegedy (2015), algorithm 1: eps is there for stability, not to set the scale.
    """
    _, var = layer.running
    dead = int(((var >= 0) & (var < layer.eps)).sum())
    if dead:
        yield Finding(
            _severity(dead, layer),
            f"{dead} of {layer.channels} running variances are under eps {layer.eps:g},"
            f" the least {float(var.min()):.1e}",
            "inputs that never change, weights near zero, or statistics damaged by hand",
            "check whether the channels are constant in the data, too; prune or re-initialise them",
            {"channels": dead},
        )


@check_layers()
def dead_input(layer: Layer, evidence: Evidence) -> Iterator[Finding]:
    """Channels whose input is constant on every batch.

    Symptom: channels that carry nothing; the layer passes on β alone.
    Computation: channels whose batch variance stayed under ``eps`` on every batch of the data.
    Threshold: ``eps``, below which the channel is no longer brought to unit variance. A note under 10 % of
    the channels, which trained networks often have; a warning from there.
    Fix: look at what produces the channel: zero weights, a ReLU that is always off, an empty input plane.
    Source: Ioffe and Szegedy (2015), algorithm 1.
    """
    seen = evidence.seen(layer)
    dead = int(seen.dead.sum()) if seen is not None else 0
    if dead:
        yield Finding(
            _severity(dead, layer),
            f"{dead} of {layer.channels} channels are constant (variance under eps) on every batch",
            "zero weights, a ReLU that is always off, or an empty plane of the input",
            "repair or prune what produces these channels",
            {"channels": dead},
        )


LARGEST_HALF, DECADES = 65504.0, 1e6


@check_layers(Evidence.stored)
def exploding_variance(layer: Layer, evidence: Evidence) -> Iterator[Finding]:
    """Running variances that half precision cannot hold, or far above those of the other channels.

    Symptom: infinity as soon as the model is cast to float16; one channel of the layer's input hides the
    others.
    Computation: variances above 65504, float16's largest number; and above a million times the layer's
    median.
    Threshold: 65504 is exact. A million times the variance is a thousand times the scale, which is float16's
    precision (2^-11): beside this channel the others are lost in rounding. In the healthy models of the fault
    bench the factor stays under 10.
    Fix: scale the input, find the layer that diverges, keep statistics in float32, recalibrate.
    Source: IEEE 754 binary16.
    """
    _, var = layer.running
    finite = var[var.isfinite()]
    if not finite.numel():
        return
    largest, usual = float(finite.max()), float(finite.median())
    beyond_half = int((finite > LARGEST_HALF).sum())
    beyond_peers = int((finite > DECADES * usual).sum()) if usual > layer.eps else 0
    if beyond_half or beyond_peers:
        what = "beyond float16" if beyond_half else "a million times the median or more"
        yield Finding(
            "warning",
            f"{max(beyond_half, beyond_peers)} of {layer.channels} running variances are {what}:"
            f" largest {largest:.2e}, median {usual:.2e}",
            "unscaled input, a diverging layer before this one, or one batch of outliers",
            "scale the input or recalibrate; keep this layer in float32",
            {"largest": largest, "median": usual},
        )
