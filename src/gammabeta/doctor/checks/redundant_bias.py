"""``redundant-bias``: a bias that the normalization after it subtracts again.

Symptom: none, but memory, time, and a parameter whose gradient is zero up to rounding.
Computation: a convolution or linear layer with a bias whose output is, unchanged, the layer's input; found
by tracing, or in ``nn.Sequential``.
Threshold: none; a note. Not for frozen layers, which subtract a constant and let the bias through.
Fix: ``bias=False`` before batch normalization; β does its work.
Source: Ioffe and Szegedy (2015), section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..evidence import Evidence
from ..finding import Finding
from ._registry import check


@check("redundant-bias")
def redundant_bias(evidence: Evidence) -> Iterator[Finding]:
    """A bias straight before batch normalization."""
    for layer in evidence.layers:
        around = evidence.around(layer)
        if around.producer_bias and not layer.frozen:
            yield Finding(
                "redundant-bias",
                layer.name,
                "note",
                f"the bias of {around.producer} goes straight into this layer",
                "subtracting the batch mean removes any constant",
                "create it with bias=False",
            )
