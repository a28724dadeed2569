"""Single channels: switched off, constant, almost without variance, or with far too much."""

from collections.abc import Iterator

from torch import Tensor

from ..evidence import Activity, Evidence, Layer
from ..finding import RECALIBRATE, Finding, Severity
from .registry import check_layers

FEW = 0.1


def _severity(count: int, layer: Layer, *, by_chance: bool = False) -> Severity:
    """A note where few of the layer's channels are concerned, or weights that have hardly been trained."""
    return "warning" if count >= FEW * layer.channels and not (by_chance and layer.young) else "note"


PEERS, ABSOLUTE, SIGMAS = 1e-3, 1e-6, 4.0


@check_layers()
def dead_gamma(layer: Layer, evidence: Evidence) -> Iterator[Finding]:
    """Channels that γ and β switch off.

    Symptom: channels that cost time and memory, and have no effect.
    Computation: |γ| below a thousandth of the layer's median, or the whole layer below 1e-6; and, where a
    ReLU follows, β/|γ| below -4 (always off) or above 4 (always on: the ReLU does nothing).
    Threshold: a thousandth is below half precision's resolution (2^-11) of its peers. A normal variable
    exceeds four standard deviations once in 30000 values. A note under 10 % of the channels, since weight
    decay and sparsity penalties do this on purpose, and for whole layers of fewer than 100 updates, where γ
    may have started at 0 on purpose; a warning else. Always on is a note.
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
            _severity(count, layer, by_chance=count == layer.channels),
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


MOVED = 4.0


@check_layers(Evidence.stored)
def collapsed_variance(layer: Layer, evidence: Evidence) -> Iterator[Finding]:
    """Running variances under ``eps``.

    Symptom: channels that carry no signal; or whose smallest change is magnified by up to 1/sqrt(eps), about
    300.
    Computation: channels whose running variance is below ``eps``; with data, those of them whose variance in
    the data, with ``eps``, is more than four times theirs.
    Threshold: at ``eps`` the divisor sqrt(var + eps) is already sqrt(2) too large, below it ``eps`` decides
    alone. Where data shows the same small variance, the statistics are right: ``dead-input`` tells of such
    channels. A few dead channels are common in trained networks: a note under 10 % of the layer's channels,
    and in layers of fewer than 100 updates; a warning else.
    Fix: give data, which shows whether the channels are constant; prune them, or recalibrate.
    Source: Ioffe and Szegedy (2015), algorithm 1: eps is there for stability, not to set the scale.
    """
    _, var = layer.running
    low, seen = (var >= 0) & (var < layer.eps), evidence.seen(layer)
    if seen is not None:
        low &= seen.population.variance + layer.eps > MOVED * (var + layer.eps)
    count = int(low.sum())
    if count:
        moved = seen is not None and count >= FEW * layer.channels
        beside = "" if seen is None else "; those of the data are not"
        yield Finding(
            "warning" if moved else _severity(count, layer, by_chance=True),
            f"{count} of {layer.channels} running variances are under eps {layer.eps:g},"
            f" the least {float(var[low].min()):.1e}{beside}",
            "inputs that never change, weights near zero, or statistics damaged by hand",
            RECALIBRATE if seen is not None else "give data: it shows whether the channels are constant",
            {"channels": count},
        )


SILENT, CONFIRMED = 1e-6, 300


@check_layers()
def dead_input(layer: Layer, evidence: Evidence) -> Iterator[Finding]:
    """Channels whose input is constant on every batch.

    Symptom: channels that carry nothing; the layer passes on β alone.
    Computation: channels whose batch variance stayed under a millionth of ``eps`` on every batch of the data.
    Threshold: what varies by less leaves the layer with a deviation under a thousandth, half precision's
    resolution (2^-11); up to ``eps`` it is a note. A note under 10 % of the channels, which trained networks
    often have; where the layer normalises the data itself, whose planes may be empty; where fewer than 300
    values were seen of channels that the running variance says were alive, or the layer has fewer than 100
    updates and its running variances agree: such is the chance of random weights. A warning else.
    Fix: look at what produces the channel: zero weights, a ReLU that is always off.
    Source: Ioffe and Szegedy (2015), algorithm 1.
    """
    seen = evidence.seen(layer)
    if seen is None:
        return
    silent, low = seen.largest < SILENT * layer.eps, int((seen.largest < layer.eps).sum())
    if not low:
        return
    dead, of_data = int(silent.sum()), evidence.around(layer).of_data
    why = "zero weights, or a ReLU that is always off", "repair or prune what produces these channels"
    if of_data:
        why = "planes of the data that are empty", "nothing, if the data is as it should be"
    yield Finding(
        _of_dead(layer, seen, silent) if dead >= FEW * layer.channels and not of_data else "note",
        f"{dead} of {layer.channels} channels are constant on every batch,"
        f" {low - dead} more have a variance under eps {layer.eps:g}",
        *why,
        {"channels": dead, "low": low},
    )


def _of_dead(layer: Layer, seen: Activity, silent: Tensor) -> Severity:
    """How bad it is that many channels are constant in the data: were they so before?"""
    if layer.stored and not layer.trivial:
        alive = int((layer.running[1][silent] >= layer.eps).sum())
        if alive >= FEW * layer.channels:
            return "warning" if seen.population.count >= CONFIRMED else "note"
    return "note" if layer.young else "warning"


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
            f"scale the input; or keep the layer in float32: `layer.float()`, then {RECALIBRATE}",
            {"largest": largest, "median": usual},
        )
