"""``tiny-batch``: too few values per channel to estimate a mean and a variance from.

Symptom: noisy training, a gap between training and evaluation, results that depend on the batch size.
Computation: the median over the loader's batches of the samples per batch and of the values per channel.
Threshold: fewer than 8 samples (Wu and He measure one point of ImageNet accuracy lost at 8, three and a
half at 4, eleven at 2), or fewer than 16 values, where a variance is uncertain by sqrt(2/15), more than a
third.
Fix: larger batches; synchronised statistics; frozen statistics when fine-tuning; GroupNorm for new models.
Source: Wu and He (2018), "Group normalization", table 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from ..evidence import Evidence
from ..finding import Finding
from ._registry import check

FEW_IMAGES, FEW_VALUES = 8, 16


@check("tiny-batch")
def tiny_batch(evidence: Evidence) -> Iterator[Finding]:
    """Batches too small to normalise by."""
    learning = [layer for layer in evidence.layers if not layer.frozen]
    if not learning or not evidence.batch_images:
        return
    images = median(evidence.batch_images)
    if images < FEW_IMAGES:
        yield _finding("", f"the loader's batches have {images:g} samples", images)
        return
    for layer in learning:
        seen = evidence.seen(layer)
        values = median(size.values for size in seen.sizes.elements()) if seen is not None else FEW_VALUES
        if values < FEW_VALUES:
            yield _finding(layer.name, f"{values:g} values per channel in a batch", values)


def _finding(name: str, evidence: str, count: float) -> Finding:
    return Finding(
        "tiny-batch",
        name,
        "warning",
        evidence,
        "a batch size chosen for memory; if this loader only evaluates, disregard this",
        "larger batches, synchronised or frozen statistics",
        {"count": count},
    )
