"""Several processes."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from ..evidence import Evidence, Layer
from ..finding import Finding
from .registry import check, check_layers

ENOUGH = 16


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
            "recalibrate on all processes together, or broadcast the buffers",
            layer=name,
        )


@check_layers()
def unsynchronized_replicas(layer: Layer, evidence: Evidence) -> Iterator[Finding]:
    """Each process normalises by its own small batch.

    Symptom: distributed training that is worse than the same total batch on one device.
    Computation: more than one process, a layer that does not synchronise, and the median of the local batch
    sizes.
    Threshold: fewer than 16 samples per process: Wu and He measure no loss from 32 to 16, 1 percentage point
    of ImageNet accuracy at 8, and 11 at 2. A note where the batch size is not known.
    Fix: ``gammabeta.convert(model, to="sync")``.
    Source: Wu and He (2018), "Group normalization", table 2; Peng et al. (2018), "MegDet".
    """
    if evidence.ranks is None or layer.synchronized or layer.frozen:
        return
    local = median(evidence.batch_images) if evidence.batch_images else None
    if local is None or local < ENOUGH:
        size = "an unknown number of" if local is None else f"{local:g}"
        yield Finding(
            "note" if local is None else "warning",
            f"{evidence.ranks.world_size} processes normalise by {size} samples each",
            "DistributedDataParallel averages gradients, not statistics",
            'use gammabeta.convert(model, to="sync")',
        )
