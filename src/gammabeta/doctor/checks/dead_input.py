"""``dead-input``: channels whose input is constant on every batch.

Symptom: channels that carry nothing; the layer passes on β alone.
Computation: channels whose batch variance stayed under ``eps`` on every batch of the data.
Threshold: ``eps``, below which the channel is no longer brought to unit variance. A note under 10 % of the
channels, which trained networks often have; then a warning.
Fix: look at what produces the channel: zero weights, a ReLU that is always off, an empty input plane.
Source: Ioffe and Szegedy (2015), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..evidence import Evidence
from ..finding import Finding
from ._registry import check

FEW = 0.1


@check("dead-input")
def dead_input(evidence: Evidence) -> Iterator[Finding]:
    """Constant channels."""
    for layer in evidence.layers:
        seen = evidence.seen(layer)
        dead = int(seen.dead.sum()) if seen is not None else 0
        if dead:
            yield Finding(
                "dead-input",
                layer.name,
                "warning" if dead >= FEW * layer.channels else "note",
                f"{dead} of {layer.channels} channels are constant (variance under eps) on every batch",
                "zero weights, a ReLU that is always off, or an empty plane of the input",
                "repair or prune what produces these channels",
                {"channels": dead},
            )
