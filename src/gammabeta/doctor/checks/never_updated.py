"""``never-updated``: the running statistics are those a new layer starts with.

Symptom: evaluation is as good as random, or much worse than training.
Computation: ``running_mean`` is exactly 0 and ``running_var`` exactly 1 in every channel; or the counter of
updates is 0 beside other values.
Threshold: exact equality. No data with a finite number of batches leaves both at exactly 0 and 1; a counter
of 0 beside other values is what weights converted from another framework or from before PyTorch 0.4 have,
so it is only noted.
Fix: train in training mode, or recalibrate on training data.
Source: ``torch.nn.BatchNorm2d``, initial values of the buffers.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..evidence import Evidence
from ..finding import Finding
from ._registry import check, stored


@check("never-updated")
def never_updated(evidence: Evidence) -> Iterator[Finding]:
    """Statistics at their initial values."""
    for layer in stored(evidence.layers):
        if layer.trivial:
            count = "" if layer.updates is None else f"; {layer.updates} updates counted"
            yield Finding(
                "never-updated",
                layer.name,
                "error",
                f"running mean 0 and variance 1 in all {layer.channels} channels{count}",
                "the layer never ran in training mode, its statistics were reset, or its checkpoint had none",
                "recalibrate on training data, or load the checkpoint that has the buffers",
                {"updates": -1 if layer.updates is None else layer.updates},
            )
        elif layer.updates == 0 and not layer.frozen_class:
            yield Finding(
                "never-updated",
                layer.name,
                "note",
                "the counter of updates is 0, although the statistics are not the initial ones",
                "weights converted from another framework, or set by hand",
                "nothing, unless momentum is None: then the next update replaces the statistics",
                {"updates": 0},
            )
