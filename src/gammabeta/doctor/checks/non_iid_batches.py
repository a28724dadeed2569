"""``non-iid-batches``: batches differ from one another more than chance allows.

Symptom: training goes well and evaluation badly: the network learns what its batch has in common.
Computation: in evaluation, where a sample's activations do not depend on its batch: the variance of
per-sample means between batches over that within batches (the F statistic of a one-way analysis of
variance), averaged over channels; the layer where it is largest.
Threshold: above 3, and five standard deviations beyond chance even if all channels moved as one (Wilson and
Hilferty's cube root). Shuffled data gives 1 on average; data sorted by class far more than 3.
Fix: shuffle; mix sources within each batch; one batch normalization per domain where they must stay apart.
Source: Wu and Johnson (2021), section 5 (batches from different domains); Fisher's analysis of variance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..evidence import Activity, Evidence
from ..finding import Finding
from ._registry import check

LEAST_BATCHES, RATIO, SIGMAS = 4, 3.0, 5.0


@check("non-iid-batches")
def non_iid_batches(evidence: Evidence) -> Iterator[Finding]:
    """Grouped or unshuffled data."""
    ratios = {}
    for layer in evidence.layers:
        seen = evidence.seen(layer)
        if seen is not None:
            ratio = variance_ratio(seen)
            if ratio is not None and _surprise(ratio, seen.eval_batches - 1) > SIGMAS:
                ratios[layer.name] = ratio
    if ratios and max(ratios.values()) > RATIO:
        name = max(ratios, key=lambda key: ratios[key])
        yield Finding(
            "non-iid-batches",
            name,
            "warning",
            f"batch means vary {ratios[name]:.1f} times as much as samples drawn at random would make them",
            "data in order of class, of recording or of source; no shuffling",
            "shuffle the training data; if this loader only evaluates, disregard this",
            {"ratio": ratios[name]},
        )


def variance_ratio(seen: Activity) -> float | None:
    """F: mean square between batches over mean square within, averaged over live channels."""
    batches, images = seen.eval_batches, seen.image_means.count
    if batches < LEAST_BATCHES or images < 2 * batches:
        return None
    within = seen.image_means_within / (images - batches)
    between = (seen.image_means.m2 - seen.image_means_within) / (batches - 1)
    live = within > 1e-12
    return float((between[live] / within[live]).mean()) if bool(live.any()) else None


def _surprise(ratio: float, freedom: int) -> float:
    """Standard deviations beyond chance, of a chi-square over its ``freedom`` (Wilson and Hilferty, 1931)."""
    spread = 2 / (9 * freedom)
    return float((math.cbrt(max(ratio, 0.0)) - (1 - spread)) / math.sqrt(spread))
