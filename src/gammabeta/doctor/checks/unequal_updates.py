"""``unequal-updates``: layers that are trained together have been updated a different number of times.

Symptom: some layers' statistics are older than others'.
Computation: ``num_batches_tracked`` divided by the layer's calls per forward pass, compared among the
layers under the same child of the model.
Threshold: any difference above 2 %. A warning among layers of one part of the model when the calls are
known; a note between parts (a new head on a trained backbone, a generator beside its discriminator) or
where the calls are not known, since a reused layer counts every call.
Fix: find out which layers were skipped, frozen for a while, checkpointed, or restored from another file.
Source: ``torch.nn.BatchNorm2d``: one count per call in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from ..evidence import Evidence, Layer
from ..finding import Finding
from ._registry import check, updating

TOLERANCE = 0.02


@check("unequal-updates")
def unequal_updates(evidence: Evidence) -> Iterator[Finding]:
    """Counters that disagree within one part of the model, or between parts."""
    parts: dict[str, list[tuple[Layer, float]]] = {}
    for layer in updating(evidence.layers):
        if layer.updates:
            part = layer.name.rpartition(".")[0].partition(".")[0]
            parts.setdefault(part, []).append((layer, layer.updates / (evidence.around(layer).calls or 1)))
    usual = {part: median(count for _, count in members) for part, members in parts.items()}
    for part, members in parts.items():
        for layer, count in members:
            if abs(count / usual[part] - 1) > TOLERANCE:
                known = all(evidence.around(other).calls for other, _ in members)
                yield Finding(
                    "unequal-updates",
                    layer.name,
                    "warning" if known else "note",
                    f"{count:g} updates per call, where its neighbours have {usual[part]:g}",
                    "skipped, frozen for a while, checkpointed, or restored from another file",
                    "recalibrate, so that all statistics come from the same weights",
                    {"updates": count, "usual": usual[part]},
                )
    if usual and max(usual.values()) / min(usual.values()) > 1 + TOLERANCE:
        counts = ", ".join(f"{part or 'top level'}: {count:g}" for part, count in usual.items())
        yield Finding(
            "unequal-updates",
            "",
            "note",
            f"parts of the model were updated a different number of times ({counts})",
            "parts trained apart, or run a different number of times per step",
            "nothing, if that is meant",
        )
