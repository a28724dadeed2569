"""``double-update``: the running statistics are updated more than once per step.

Symptom: statistics follow the last batches more closely than momentum says; evaluation is noisier.
Computation: a forward and backward pass on two samples; a layer whose statistics change *during the
backward* is run again by activation checkpointing. Without that, updates per call beside the optimiser's
steps.
Threshold: any change of a bit in the backward is certain: a warning. A ratio between 1.8 and 2.2 is a note
only, since gradient accumulation over two batches, and a discriminator that sees a real and a generated
batch per step, have it in good health.
Fix: let the recomputation skip the update (``gammabeta.nn`` layers do), or halve the momentum.
Source: ``torch.utils.checkpoint``: the forward runs again during the backward, in both of its modes.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..evidence import Evidence
from ..finding import Finding
from ._registry import check, updating

LOW, HIGH = 1.8, 2.2


@check("double-update")
def double_update(evidence: Evidence) -> Iterator[Finding]:
    """A second update in the backward, or twice as many updates as steps."""
    again = evidence.updated_in_backward or ()
    steps = evidence.optimizer.steps if evidence.optimizer is not None else None
    for layer in updating(evidence.layers):
        if layer.name in again:
            yield Finding(
                "double-update",
                layer.name,
                "warning",
                "the running statistics change during the backward pass",
                "activation checkpointing runs the layer's forward again, and updates again",
                "convert to gammabeta.nn layers, which skip the second update, or use 1 - sqrt(1 - momentum)",
            )
        elif steps and layer.updates and evidence.updated_in_backward is None:
            ratio = layer.updates / (steps * (evidence.around(layer).calls or 1))
            if LOW <= ratio <= HIGH:
                yield Finding(
                    "double-update",
                    layer.name,
                    "note",
                    f"{layer.updates} updates in {steps} optimiser steps",
                    "activation checkpointing; or two forward passes per step, which is in order",
                    "give an example, so that a backward pass can tell the two apart",
                    {"ratio": ratio},
                )
