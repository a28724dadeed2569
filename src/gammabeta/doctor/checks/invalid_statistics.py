"""``invalid-statistics``: a running mean or variance that is not finite, or a negative variance.

Symptom: NaN or infinity in evaluation while training still gives finite losses.
Computation: every value is looked at.
Threshold: none: a single such value makes its channel's output undefined.
Fix: recalibrate; if the layer's input itself is not finite, that will say so and change nothing.
Source: one non-finite batch stays in an exponential average for ever; E[x²] − E[x]² can be negative.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..evidence import Evidence
from ..finding import Finding
from ._registry import check, stored


@check("invalid-statistics")
def invalid_statistics(evidence: Evidence) -> Iterator[Finding]:
    """Non-finite or negative statistics."""
    for layer in stored(evidence.layers):
        assert layer.mean is not None  # stored() gives layers with statistics
        assert layer.var is not None
        infinite = int((~layer.mean.isfinite() | ~layer.var.isfinite()).sum())
        negative = int((layer.var < 0).sum())
        if infinite or negative:
            counts = [f"{infinite} not finite"] * bool(infinite) + [f"{negative} negative"] * bool(negative)
            yield Finding(
                "invalid-statistics",
                layer.name,
                "error",
                f"of {layer.channels} channels {' and '.join(counts)}",
                "a batch with NaN or infinity, overflow in half precision, or a variance as E[x²] - E[x]²",
                "recalibrate; guard training against non-finite batches",
                {"not_finite": infinite, "negative": negative},
            )
