"""The loss in evaluation against the loss in training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean, stdev

from ..evidence import Evidence, Gap
from ..finding import Finding, Severity
from .registry import check

SHARE, ERRORS, SEVERE, TINY = 0.1, 3.0, 0.5, 1e-3


@check
def train_eval_gap(evidence: Evidence) -> Iterator[Finding]:
    """Batch normalization makes the model worse in evaluation than in training.

    Symptom: a loss in ``eval()`` far above that in ``train()`` on the same data.
    Computation: the mean loss of the same data in four modes: everything in training; only batch
    normalization in training; evaluation on the data's exact statistics; evaluation as is. First minus second
    comes from dropout and the like; it exists only in training and is never a finding. Third minus second is
    batch noise, fourth minus third stale statistics. Without a loss: the part of the output's variance that
    differs between two modes.
    Threshold: fourth minus second, batch normalization's own share, must exceed 10 % of the second, and the
    larger of its two parts must exceed three of its standard errors over the batches, or be positive in every
    batch. The healthy models of the fault bench reach 7 %. Without a loss: 10 % of the output's variance
    (they reach 1 %); an error from 50 % in both.
    Fix: for stale statistics, recalibrate; for noise, larger or shuffled batches, synchronised statistics.
    Source: Wu and Johnson (2021), "Rethinking 'Batch' in BatchNorm", sections 3 and 4.
    """
    gap = evidence.gap
    if gap is None or not evidence.layers:
        return
    if gap.bn_train is None or gap.population is None or gap.evaluation is None:
        yield from _by_output(gap)
        return
    if not math.isfinite(gap.bn_train):
        return
    if not math.isfinite(gap.evaluation):
        yield _finding("stale", "error", f"the loss in evaluation is {gap.evaluation}", {})
        return
    total = gap.evaluation - gap.bn_train
    scale = max(abs(gap.bn_train), TINY)
    stale, noise = gap.evaluation - gap.population, gap.population - gap.bn_train
    part, differences = ("stale", gap.stale) if stale >= noise else ("noise", gap.noise)
    if total <= SHARE * scale or not _certain(differences):
        return
    yield _finding(
        part,
        "error" if total > SEVERE * scale else "warning",
        f"loss {gap.evaluation:.4g} in evaluation, {gap.bn_train:.4g} with batch statistics:"
        f" stale statistics {stale:+.3g}, batch noise {noise:+.3g}",
        {"evaluation": gap.evaluation, "bn_train": gap.bn_train, "stale": stale, "noise": noise},
    )


def _by_output(gap: Gap) -> Iterator[Finding]:
    for part, change in (("stale", gap.output_change), ("noise", gap.output_noise)):
        if change > SHARE:
            other = "exact" if part == "stale" else "batch"
            first = "the stored" if part == "stale" else "exact"
            yield _finding(
                part,
                "error" if change > SEVERE else "warning",
                f"{change:.0%} of the output's variance changes between {first} and {other} statistics",
                {"change": change},
            )


def _certain(differences: tuple[float, ...]) -> bool:
    """Whether the batches agree: all positive, or their mean several standard errors above zero."""
    if len(differences) < 2 or all(difference > 0 for difference in differences):
        return True
    return fmean(differences) > ERRORS * stdev(differences) / math.sqrt(len(differences))


def _finding(part: str, severity: Severity, evidence: str, values: dict[str, float | int | str]) -> Finding:
    if part == "stale":
        cause = "the running statistics are not those of the data under the final weights"
        fix = "recalibrate: gammabeta.recalibrate(model, loader)"
    else:
        cause = "the network relies on its batch: small, grouped or unrepresentative batches"
        fix = "larger, shuffled batches; GhostBatchNorm or synchronised statistics in training"
    return Finding("train-eval-gap", "", severity, evidence, cause, fix, {"part": part, **values})
