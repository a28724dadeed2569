"""``exploding-variance``: running variances that half precision cannot hold, or far above their peers'.

Symptom: infinity as soon as the model is cast to float16; one channel that drowns the others before the
layer.
Computation: variances above 65504, float16's largest number; and above a million times the layer's median.
Threshold: 65504 is exact. Six decades of variance are three of scale, all of float16's precision (2^-11):
the other channels are lost beside this one. The healthy models of the fault bench stay under one decade.
Fix: scale the input, find the layer that diverges, keep statistics in float32, recalibrate.
Source: IEEE 754 binary16.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..evidence import Evidence
from ..finding import Finding
from ._registry import check, stored

LARGEST_HALF = 65504.0
DECADES = 1e6


@check("exploding-variance")
def exploding_variance(evidence: Evidence) -> Iterator[Finding]:
    """Variances out of all proportion."""
    for layer in stored(evidence.layers):
        assert layer.var is not None  # stored() gives layers with statistics
        finite = layer.var[layer.var.isfinite()]
        if not finite.numel():
            continue
        largest, usual = float(finite.max()), float(finite.median())
        beyond_half = int((finite > LARGEST_HALF).sum())
        beyond_peers = int((finite > DECADES * usual).sum()) if usual > layer.eps else 0
        if beyond_half or beyond_peers:
            what = "beyond float16" if beyond_half else "a million times the median or more"
            yield Finding(
                "exploding-variance",
                layer.name,
                "warning",
                f"{max(beyond_half, beyond_peers)} of {layer.channels} running variances are {what}:"
                f" largest {largest:.2e}, median {usual:.2e}",
                "unscaled input, a diverging layer before this one, or one batch of outliers",
                "scale the input or recalibrate; keep this layer in float32",
                {"largest": largest, "median": usual},
            )
