"""``half-precision-buffers``: running statistics kept in float16 or bfloat16.

Symptom: statistics that stop moving short of the truth; variances above 65504 become infinite.
Computation: the dtype of ``running_mean``.
Threshold: any dtype of fewer than 24 significant bits. An update changes the average by momentum times the
difference; below half a unit in the last place (2^-9 of the value in bfloat16) it is rounded away, so with
momentum 0.1 the average stalls 2 % from where it should be.
Fix: keep batch normalization in float32: ``layer.float()``; it accepts half-precision input.
Source: Micikevicius et al. (2018), "Mixed precision training", section 3.3: statistics in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..evidence import Evidence
from ..finding import Finding
from ._registry import check, stored


@check("half-precision-buffers")
def half_precision_buffers(evidence: Evidence) -> Iterator[Finding]:
    """Statistics in a dtype that stalls."""
    for layer in stored(evidence.layers):
        if layer.buffer_dtype in (torch.float16, torch.bfloat16):
            stall = float(torch.finfo(layer.buffer_dtype).eps) / 2 / (layer.momentum or 0.1)
            yield Finding(
                "half-precision-buffers",
                layer.name,
                "warning",
                f"running statistics in {str(layer.buffer_dtype).removeprefix('torch.')}:"
                f" the average stalls {stall:.1%} short",
                "the whole model was cast to half precision, or created so",
                "keep this layer in float32 with .float(), then recalibrate",
                {"stall": stall},
            )
