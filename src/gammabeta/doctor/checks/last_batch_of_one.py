"""``last-batch-of-one``: the last batch of an epoch leaves one value per channel.

Symptom: "Expected more than 1 value per channel when training", at the end of the first epoch.
Computation: the loader's length, batch size and ``drop_last``; or, given data, a last batch of one sample
after larger ones.
Threshold: exactly one sample left. A warning when some layer gets one value per sample (after pooling or in
fully connected layers), which raises; a note otherwise, since that batch's statistics are merely poor.
Fix: ``drop_last=True``, or a batch size that leaves another remainder.
Source: ``torch.nn.functional.batch_norm``.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..evidence import Evidence, Layer
from ..finding import Finding
from ._registry import check


@check("last-batch-of-one")
def last_batch_of_one(evidence: Evidence) -> Iterator[Finding]:
    """A remainder of one sample."""
    shape, sizes = evidence.loader, evidence.batch_images
    declared = shape is not None and not shape.drop_last and 1 < shape.batch_size < shape.samples
    left = declared and shape is not None and shape.samples % shape.batch_size == 1
    if not left and not (len(sizes) > 1 and sizes[-1] == 1 and max(sizes) > 1):
        return
    if not evidence.layers:
        return
    bare = [layer.label for layer in evidence.layers if _one_value_per_sample(evidence, layer)]
    count = (
        f"{shape.samples} samples in batches of {shape.batch_size}" if left and shape else "the last batch"
    )
    yield Finding(
        "last-batch-of-one",
        "",
        "warning" if bare else "note",
        f"{count} leaves one sample" + (f"; one value per channel in {', '.join(bare[:3])}" if bare else ""),
        "the number of samples is one more than a multiple of the batch size",
        "use drop_last=True in training",
    )


def _one_value_per_sample(evidence: Evidence, layer: Layer) -> bool:
    seen = evidence.seen(layer)
    if seen is None:
        return "1d" in layer.kind
    calls = evidence.around(layer).calls or 1
    return any(size.values <= size.images for size in seen.sizes) and calls >= 1
