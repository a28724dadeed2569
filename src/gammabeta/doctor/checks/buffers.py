"""The buffers themselves: never updated, untracked, not finite, too coarse, unlike on other processes."""

from collections.abc import Iterator

import torch

from ..evidence import Evidence, Layer
from ..finding import RECALIBRATE, Finding
from .registry import check, check_layers


@check_layers(Evidence.stored)
def never_updated(layer: Layer, evidence: Evidence) -> Iterator[Finding]:
    """The running statistics are still those of a new layer.

    Symptom: evaluation is no better than chance, or much worse than training.
    Computation: ``running_mean`` is exactly 0 and ``running_var`` exactly 1 in every channel; or the counter
    of updates is 0, although the statistics are others. A layer that neither the example nor the data
    reaches gives a note only.
    Threshold: exact equality. No data with a finite number of batches leaves both at exactly 0 and 1; a
    counter of 0 with other statistics is usual for weights from another framework or from before PyTorch 0.4,
    so it is only a note.
    Fix: train in training mode, or recalibrate on training data.
    Source: ``torch.nn.BatchNorm2d``, initial values of the buffers.
    """
    if layer.name in evidence.unreached and evidence.seen(layer) is None:
        if layer.trivial:
            yield Finding(
                "note",
                "the layer never runs on the data given, and its statistics are those of a new layer",
                "a layer that is not used, or only for other inputs",
                "nothing, if it is not used; else give data that reaches it",
                {"updates": -1 if layer.updates is None else layer.updates},
            )
    elif layer.trivial:
        count = "" if layer.updates is None else f"; {layer.updates} updates counted"
        yield Finding(
            "error",
            f"running mean 0 and variance 1 in all {layer.channels} channels{count}",
            "the layer never ran in training mode, its statistics were reset, or its checkpoint had none",
            f"{RECALIBRATE} on training data, or load the checkpoint that has the buffers",
            {"updates": -1 if layer.updates is None else layer.updates},
        )
    elif layer.updates == 0 and not layer.frozen_class:
        yield Finding(
            "note",
            "the counter of updates is 0, although the statistics are not the initial ones",
            "weights converted from another framework, or set by hand",
            "nothing, unless momentum is None: then the next update replaces the statistics",
            {"updates": 0},
        )


@check_layers()
def tracking_toggled(layer: Layer, evidence: Evidence) -> Iterator[Finding]:
    """``track_running_stats`` says one thing and the buffers another.

    Symptom: training does not update statistics that evaluation then uses; or evaluation silently uses the
    batch.
    Computation: the attribute is compared with the presence of ``running_mean`` and ``running_var``.
    Threshold: exact. Statistics that exist but are not tracked are an error (they are used in evaluation and
    never updated in training), statistics that are tracked but do not exist a warning.
    Fix: choose at construction; the attribute is not meant to be changed afterwards.
    Source: ``torch.nn.BatchNorm2d.forward``: evaluation uses the buffers whenever they exist.
    """
    if layer.frozen_class:
        return
    if not layer.tracks and layer.mean is not None:
        yield Finding(
            "error",
            "track_running_stats is False, but the layer has running statistics",
            "the attribute was changed after construction: training does not update what evaluation uses",
            f"track again: `layer.track_running_stats = True`, then {RECALIBRATE}; or remove both buffers",
        )
    elif layer.tracks and layer.mean is None:
        yield Finding(
            "warning",
            "track_running_stats is True, but the layer has no running statistics",
            "the attribute was changed, or the buffers were removed, after construction",
            f"create the layer anew: evaluation now depends on the batch; then {RECALIBRATE}",
        )


@check_layers(Evidence.stored)
def invalid_statistics(layer: Layer, evidence: Evidence) -> Iterator[Finding]:
    """A running mean or variance that is not finite, or a negative variance.

    Symptom: NaN or infinity in evaluation while training still gives finite losses.
    Computation: every value is looked at.
    Threshold: none: a single such value makes its channel's output undefined.
    Fix: recalibrate; if the layer's input itself is not finite, recalibration says so and changes nothing.
    Source: one non-finite batch stays in an exponential average for ever; E[x²] − E[x]² can be negative.
    """
    mean, var = layer.running
    infinite = int((~mean.isfinite() | ~var.isfinite()).sum())
    negative = int((var < 0).sum())
    if infinite or negative:
        counts = [f"{infinite} not finite"] * bool(infinite) + [f"{negative} negative"] * bool(negative)
        yield Finding(
            "error",
            f"of {layer.channels} channels {' and '.join(counts)}",
            "a batch with NaN or infinity, overflow in half precision, or a variance as E[x²] - E[x]²",
            f"{RECALIBRATE}; look for such batches in training: `guard = gammabeta.watch(model, optimizer)`",
            {"not_finite": infinite, "negative": negative},
        )


@check_layers(Evidence.stored)
def half_precision_buffers(layer: Layer, evidence: Evidence) -> Iterator[Finding]:
    """Running statistics kept in float16 or bfloat16.

    Symptom: statistics that stop before they reach the true values; variances above 65504 become infinite.
    Computation: the dtype of ``running_mean``.
    Threshold: any dtype of fewer than 24 significant bits. An update changes the average by momentum times
    the difference; below half a unit in the last place (2^-9 of the value in bfloat16) it is rounded away, so
    with momentum 0.1 the average stalls 2 % from where it should be.
    Fix: keep batch normalization in float32: ``layer.float()``; it accepts half-precision input.
    Source: Micikevicius et al. (2018), "Mixed precision training", section 3.3: statistics in float32.
    """
    if layer.buffer_dtype in (torch.float16, torch.bfloat16):
        stall = float(torch.finfo(layer.buffer_dtype).eps) / 2 / (layer.momentum or 0.1)
        yield Finding(
            "warning",
            f"running statistics in {str(layer.buffer_dtype).removeprefix('torch.')}:"
            f" the average stops {stall:.1%} before its true value",
            "the whole model was cast to half precision, or created so",
            f"keep the layer in float32: `layer.float()`, then {RECALIBRATE}",
            {"stall": stall},
        )


@check
def rank_divergence(evidence: Evidence) -> Iterator[Finding]:
    """The processes hold different running statistics.

    Symptom: validation that depends on the process; a checkpoint that holds one process's statistics only.
    Computation: a digest of every layer's buffers, compared over the processes.
    Threshold: any bit.
    Fix: recalibrate on all processes together, or broadcast the buffers from one.
    Source: ``torch.nn.parallel.DistributedDataParallel``: ``broadcast_buffers`` copies rank 0's at the next
    forward.
    """
    if evidence.ranks is None:
        return
    for name in evidence.ranks.diverging:
        yield Finding(
            "warning",
            f"buffers differ between the {evidence.ranks.world_size} processes",
            "each process averages its own batches, and the averages were not made equal afterwards",
            f"{RECALIBRATE} on all processes together, or broadcast the buffers",
            layer=name,
        )
