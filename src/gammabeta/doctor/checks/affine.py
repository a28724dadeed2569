"""γ and β, and a bias before the layer that has no effect."""

from collections.abc import Iterator

from torch import Tensor

from ..evidence import Evidence, Layer
from ..finding import Finding, Severity
from .registry import check, check_layers

PEERS, ABSOLUTE, SIGMAS, FEW = 1e-3, 1e-6, 4.0, 0.1


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
            _severity(count, layer.channels),
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
            _severity(off, layer.channels),
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


def _severity(count: int, channels: int) -> Severity:
    return "warning" if count >= FEW * channels else "note"


@check
def weight_decay_on_affine(evidence: Evidence) -> Iterator[Finding]:
    """Weight decay on γ or β.

    Symptom: usually none; sometimes channels that fade, and a slightly worse optimum.
    Computation: the optimiser's groups.
    Threshold: any positive weight decay; a note, since opinions and measurements differ.
    Fix: a second parameter group without weight decay for all one-dimensional parameters.
    Source: Goyal et al. (2017), "Accurate, large minibatch SGD", section 5.1; He et al. (2019), "Bag of
    tricks", section 3.1 ("no bias decay").
    """
    if evidence.optimizer is None:
        return
    for name, which in evidence.optimizer.decayed.items():
        yield Finding(
            "note",
            f"{' and '.join(which)} in a group with weight decay {evidence.optimizer.weight_decay:g}",
            "one parameter group for everything",
            "put one-dimensional parameters in a group without weight decay",
            layer=name,
        )


@check_layers()
def redundant_bias(layer: Layer, evidence: Evidence) -> Iterator[Finding]:
    """A bias that has no effect, because the normalization after it subtracts it.

    Symptom: none in the results; it costs memory and time, and its gradient is zero up to rounding.
    Computation: a convolution or linear layer with a bias whose output goes unchanged into the layer; found
    by tracing, or in ``nn.Sequential``.
    Threshold: none; a note. Not for frozen layers, which subtract a constant: there the bias has an effect.
    Fix: ``bias=False`` before batch normalization; β replaces it.
    Source: Ioffe and Szegedy (2015), section 3.2.
    """
    around = evidence.around(layer)
    if around.producer_bias and not layer.frozen:
        yield Finding(
            "note",
            f"the bias of {around.producer} goes directly into this layer",
            "subtracting the batch mean removes any constant",
            "create it with bias=False",
        )
