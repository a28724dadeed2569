"""``rank-divergence``: the processes hold different running statistics.

Symptom: validation that depends on the process; a checkpoint that holds one process's statistics only.
Computation: a digest of every layer's buffers, compared over the processes.
Threshold: any bit.
Fix: recalibrate on all processes together, or broadcast the buffers from one.
Source: ``torch.nn.parallel.DistributedDataParallel``: ``broadcast_buffers`` copies rank 0's at the next
forward.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..evidence import Evidence
from ..finding import Finding
from ._registry import check


@check("rank-divergence")
def rank_divergence(evidence: Evidence) -> Iterator[Finding]:
    """Buffers that differ between processes."""
    if evidence.ranks is None:
        return
    for name in evidence.ranks.diverging:
        yield Finding(
            "rank-divergence",
            name,
            "warning",
            f"buffers differ between the {evidence.ranks.world_size} processes",
            "each process averages its own batches, and nothing has made them equal since",
            "recalibrate on all processes together, or broadcast the buffers",
        )
