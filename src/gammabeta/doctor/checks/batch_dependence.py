"""``batch-dependence``: in evaluation, a sample's output depends on the others in its batch.

Symptom: predictions that change with the batch size; one image gives nonsense.
Computation: up to eight samples together, and the same in batches of two; the largest difference over the
standard deviation of the output.
Threshold: a thousandth in float32, a twentieth in half precision: other shapes take other kernels, which
round differently; that is 1e-6 and 1e-2.
Fix: give the layers running statistics (``track_running_stats=True``, then recalibrate).
Source: ``torch.nn.BatchNorm2d``: without running statistics the batch's are used in evaluation, too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..evidence import Evidence
from ..finding import Finding
from ._registry import check

SINGLE, HALF = 1e-3, 0.05


@check("batch-dependence")
def batch_dependence(evidence: Evidence) -> Iterator[Finding]:
    """Outputs that notice their company."""
    change = evidence.batch_dependence
    half = any(layer.parameter_dtype in (torch.float16, torch.bfloat16) for layer in evidence.layers)
    if change is None or change <= (HALF if half else SINGLE):
        return
    bare = [layer.name for layer in evidence.layers if layer.mean is None]
    for name in bare or [""]:
        yield Finding(
            "batch-dependence",
            name,
            "warning",
            f"outputs change by up to {change:.2g} of their spread with the other samples in the batch",
            "no running statistics: evaluation uses the batch's"
            if bare
            else "a layer mixes samples in evaluation",
            "use track_running_stats=True and recalibrate" if bare else "find the layer that ignores eval()",
            {"change": change},
        )
