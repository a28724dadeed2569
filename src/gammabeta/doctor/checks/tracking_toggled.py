"""``tracking-toggled``: ``track_running_stats`` says one thing and the buffers another.

Symptom: training does not update statistics that evaluation then uses; or evaluation silently uses the
batch.
Computation: the attribute beside the presence of ``running_mean`` and ``running_var``.
Threshold: exact. Statistics that exist but are not tracked are an error (they are used in evaluation and
never updated in training), statistics that are tracked but do not exist a warning.
Fix: choose at construction; the attribute is not meant to be changed afterwards.
Source: ``torch.nn.BatchNorm2d.forward``: evaluation uses the buffers whenever they exist.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..evidence import Evidence
from ..finding import Finding
from ._registry import check


@check("tracking-toggled")
def tracking_toggled(evidence: Evidence) -> Iterator[Finding]:
    """The attribute against the buffers."""
    for layer in evidence.layers:
        if layer.frozen_class:
            continue
        if not layer.tracks and layer.mean is not None:
            yield Finding(
                "tracking-toggled",
                layer.name,
                "error",
                "track_running_stats is False, but the layer has running statistics",
                "the attribute was changed after construction: training does not update what evaluation uses",
                "set track_running_stats back to True and recalibrate, or remove both buffers",
            )
        elif layer.tracks and layer.mean is None:
            yield Finding(
                "tracking-toggled",
                layer.name,
                "warning",
                "track_running_stats is True, but the layer has no running statistics",
                "the attribute was changed, or the buffers were removed, after construction",
                "create the layer anew and recalibrate: evaluation now depends on the batch",
            )
