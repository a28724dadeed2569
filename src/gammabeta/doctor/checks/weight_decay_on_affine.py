"""``weight-decay-on-affine``: γ or β in a parameter group with weight decay.

Symptom: usually none; sometimes channels that fade, and a slightly worse optimum.
Computation: the optimiser's groups.
Threshold: any positive weight decay; a note, since opinions and measurements differ.
Fix: a second parameter group without weight decay for all one-dimensional parameters.
Source: Goyal et al. (2017), "Accurate, large minibatch SGD", section 5.1; He et al. (2019), "Bag of
tricks", section 3.1 ("no bias decay").
"""

from __future__ import annotations

from collections.abc import Iterator

from ..evidence import Evidence
from ..finding import Finding
from ._registry import check


@check("weight-decay-on-affine")
def weight_decay_on_affine(evidence: Evidence) -> Iterator[Finding]:
    """Decay on γ and β."""
    if evidence.optimizer is None:
        return
    for name, which in evidence.optimizer.decayed.items():
        yield Finding(
            "weight-decay-on-affine",
            name,
            "note",
            f"{' and '.join(which)} in a group with weight decay {evidence.optimizer.weight_decay:g}",
            "one parameter group for everything",
            "put one-dimensional parameters in a group without weight decay",
        )
