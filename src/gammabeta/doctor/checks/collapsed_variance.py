"""``collapsed-variance``: running variances under ``eps``.

Symptom: channels that say nothing; or that are magnified by up to 1/sqrt(eps), about 300, on the least
change.
Computation: channels whose running variance is below ``eps``.
Threshold: at ``eps`` the divisor sqrt(var + eps) is already sqrt(2) too large, below it ``eps`` decides
alone. A few dead channels are common in trained networks: a note under 10 % of the layer's channels, then a
warning.
Fix: prune the channels, repair the initialisation before them, or scale the input.
Source: Ioffe and Szegedy (2015), algorithm 1: eps is there for stability, not to set the scale.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..evidence import Evidence
from ..finding import Finding
from ._registry import check, stored

FEW = 0.1


@check("collapsed-variance")
def collapsed_variance(evidence: Evidence) -> Iterator[Finding]:
    """Channels whose scale eps decides."""
    for layer in stored(evidence.layers):
        assert layer.var is not None  # stored() gives layers with statistics
        dead = int(((layer.var >= 0) & (layer.var < layer.eps)).sum())
        if dead:
            yield Finding(
                "collapsed-variance",
                layer.name,
                "warning" if dead >= FEW * layer.channels else "note",
                f"{dead} of {layer.channels} running variances are under eps {layer.eps:g},"
                f" the least {float(layer.var.min()):.1e}",
                "inputs that never change, weights near zero, or statistics damaged by hand",
                "see whether the channels are dead in the data, too; prune or re-initialise them",
                {"channels": dead},
            )
