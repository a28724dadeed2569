"""``init-residue``: the initial mean 0 and variance 1 still weigh in the running statistics.

Symptom: a briefly trained model is worse in evaluation; more training heals it.
Computation: an exponential average of weight ``momentum`` on the new value keeps ``(1 - momentum) **
updates`` of its initial value. Given data, that share is also estimated from the statistics themselves, by
least squares of (population - running) on (population - initial), both in units of the population's
standard deviation.
Threshold: 1 %, about the noise that batches of 64 leave in a variance averaged with momentum 0.1; or what
is left of the initial variance 1 is 10 % of the median running variance, which a share far below 1 % is
where activations are small. A running variance below the share proves that the start is gone; so does,
given data, less than a quarter of the predicted share: recalibrated statistics are not accused. An error
from 30 %, where the variance of a layer may be wrong by that much, if data confirms it.
Fix: recalibrate, train longer, or use a larger momentum in short runs.
Source: Kingma and Ba (2015), section 3, on the same bias of an exponential average that starts from a
constant.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...stats.moments import Moments
from ..evidence import Evidence
from ..finding import Finding
from ._registry import check, updating

SHARE, EXCESS, SEVERE = 0.01, 0.1, 0.3


def measured_share(mean: Tensor, var: Tensor, population: Moments) -> float:
    """Share of the initial 0 and 1 in the statistics, by least squares over channels."""
    true_var = population.unbiased_variance.clamp(min=1e-30)
    toward = torch.cat([population.mean / true_var.sqrt(), (true_var - 1) / true_var])
    missing = torch.cat([(population.mean - mean) / true_var.sqrt(), (true_var - var) / true_var])
    return float((toward * missing).sum() / toward.square().sum().clamp(min=1e-30))


@check("init-residue")
def init_residue(evidence: Evidence) -> Iterator[Finding]:
    """Too few updates to forget the start."""
    for layer in updating(evidence.layers):
        if layer.trivial or not layer.updates or layer.momentum is None or not 0 < layer.momentum < 1:
            continue
        share = (1 - layer.momentum) ** layer.updates
        assert layer.mean is not None  # updating() gives layers with statistics
        assert layer.var is not None
        usual = float(layer.var.median())
        if not (layer.mean.isfinite().all() and layer.var.isfinite().all()):
            continue  # invalid-statistics has more to say
        excess = share / max(usual, 1e-30)
        if share <= SHARE and excess <= EXCESS:
            continue
        if bool((layer.var < share).any()):
            continue  # an average that still holds that share of 1 could not be smaller
        seen = evidence.seen(layer)
        if seen is not None and measured_share(layer.mean, layer.var, seen.population) < share / 4:
            continue
        yield Finding(
            "init-residue",
            layer.name,
            "error" if max(share, excess) >= SEVERE and seen is not None else "warning",
            f"{share:.2g} of the initial mean 0 and variance 1 remain after {layer.updates} updates;"
            f" the median running variance is {usual:.2g}",
            f"too few updates for momentum {layer.momentum:g} to forget where it started",
            "recalibrate, or train longer"
            + ("" if seen else "; if it was recalibrated, give data to confirm it"),
            {"share": share, "excess": excess, "updates": layer.updates},
        )
