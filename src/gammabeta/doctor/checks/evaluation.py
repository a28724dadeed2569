"""Evaluation: its loss against training's; and that it neither changes the model nor mixes samples."""

import math
from collections.abc import Iterator
from statistics import fmean, stdev

from ..evidence import Evidence, Gap
from ..finding import RECALIBRATE, Finding, Severity
from .registry import check

SHARE, ERRORS, SEVERE, TINY, TIMES_CHANCE = 0.1, 3.0, 0.5, 1e-3, 2.0


@check
def train_eval_gap(evidence: Evidence) -> Iterator[Finding]:
    """The model is worse in evaluation than in training.

    Symptom: a loss in ``eval()`` far above that in ``train()`` on the same data.
    Computation: the mean loss of the same data in four modes: everything in training; only batch
    normalization in training; evaluation on the data's exact statistics; evaluation as is. First minus second
    comes from dropout and the like, which make training worse; a second above the first, beyond the same
    thresholds, is a finding whoever made the layer. Modules that are no batch normalization known here, but
    keep statistics in training, are in training with it in the second mode. Third minus second is
    batch noise, fourth minus third stale statistics. Without a loss: the part of the output's variance that
    differs between two modes. Where there is noise, up to four batches drawn anew from all the data show how
    much of it is chance: theirs, if each layer is called once and no other module keeps statistics; else the
    part that falls in all of them as one batch.
    Threshold: fourth minus second, batch normalization's own share, must exceed 10 % of the second without
    what is chance. The larger of its two parts must also exceed three of its standard errors over the
    batches, or be positive in every batch; noise also what is chance by three of its errors. The healthy
    models of the fault bench reach 7 %. Without a loss: 10 % of the output's variance (they reach 1 %), and
    noise twice what is chance; an error from 50 % in both. Noise that is all chance is a note: ``tiny-batch``
    says where batches are too small.
    Fix: for stale statistics, recalibrate; for noise, larger or shuffled batches, synchronised statistics.
    Source: Wu and Johnson (2021), "Rethinking 'Batch' in BatchNorm", sections 3 and 4.
    """
    gap = evidence.gap
    if gap is None:
        return
    own = evidence.own_statistics
    if gap.losses is None:
        yield from _by_output(gap, own)
        return
    bn_train, population, evaluation = gap.losses
    if not math.isfinite(bn_train):
        return
    if not math.isfinite(evaluation):
        yield _finding("stale", "error", f"the loss in evaluation is {evaluation}", {}, own)
        return
    scale = max(abs(bn_train), TINY)
    stale, noise = evaluation - population, population - bn_train
    chance = min(max(noise, 0.0), gap.by_size)
    total = evaluation - bn_train - chance
    found = (
        f"loss {evaluation:.4g} in evaluation, {bn_train:.4g} with batch statistics:"
        f" stale statistics {stale:+.3g}, batch noise {noise:+.3g}"
    )
    values: dict[str, float | int | str] = {"evaluation": evaluation, "bn_train": bn_train}
    values |= {"stale": stale, "noise": noise}
    part = "stale" if stale >= noise - chance else "noise"
    certain = _certain(gap.stale) if part == "stale" else _beyond_size(gap, chance)
    if total > SHARE * scale and certain:
        yield _finding(part, "error" if total > SEVERE * scale else "warning", found, values, own)
        return
    if total + chance > SHARE * scale and chance > 0:
        yield _by_chance(f"{found}, {chance:+.3g} of it by the size of the batches", values)
    if gap.elsewhere and gap.train is not None and math.isfinite(gap.train):
        apart, scale = bn_train - gap.train, max(abs(gap.train), TINY)
        if apart > SHARE * scale and _certain(gap.elsewhere):
            yield _finding(
                "elsewhere",
                "error" if apart > SEVERE * scale else "warning",
                f"loss {evaluation:.4g} in evaluation, {gap.train:.4g} in training, of which the known batch"
                f" normalization makes {evaluation - bn_train:+.3g}",
                {"evaluation": evaluation, "train": gap.train},
                own,
            )


def _by_output(gap: Gap, own: tuple[str, ...]) -> Iterator[Finding]:
    for part, change, between in (
        ("stale", gap.output_change, "the stored and exact"),
        ("noise", gap.output_noise, "exact and batch"),
    ):
        if change <= SHARE:
            continue
        share = (
            f"{change:.0%} of the output's variance"
            if math.isfinite(change)
            else "an output without variance"
        )
        found = f"{share} changes between {between} statistics"
        chance = gap.by_size if part == "noise" else 0.0
        if change - chance <= SHARE or change <= TIMES_CHANCE * chance:
            yield _by_chance(f"{found}, {chance:.0%} by the size of the batches", {"change": change})
            continue
        severity: Severity = "error" if change > SEVERE else "warning"
        yield _finding(part, severity, found, {"change": change}, own)


def _by_chance(found: str, values: dict[str, float | int | str]) -> Finding:
    cause = "batches of this size have other statistics than all the data, however they are drawn"
    fix = "nothing, or larger batches in training"
    return Finding("note", found, cause, fix, {"part": "chance", **values})


def _beyond_size(gap: Gap, chance: float) -> bool:
    """Whether the batches agree that there is noise, and it is more than their size explains for certain."""
    if chance > 0 and len(gap.chance) > 1:
        chance += ERRORS * stdev(gap.chance) / math.sqrt(len(gap.chance))
    return _certain(gap.noise) and (not gap.noise or fmean(gap.noise) > chance)


def _certain(differences: tuple[float, ...]) -> bool:
    """Whether the batches agree: all positive, or their mean several standard errors above zero."""
    if len(differences) < 2 or all(difference > 0 for difference in differences):
        return True
    return fmean(differences) > ERRORS * stdev(differences) / math.sqrt(len(differences))


def _finding(
    part: str, severity: Severity, evidence: str, values: dict[str, float | int | str], own: tuple[str, ...]
) -> Finding:
    if own and part != "stale":
        more = f" and {len(own) - 3} more" if len(own) > 3 else ""
        cause = f"the statistics that {', '.join(own[:3])}{more} keep: stale, or taken of other data"
        fix = "run training data through the model in training mode without learning, or use nn.BatchNorm"
        part = "own"
    elif part == "elsewhere":
        cause = "something other than the known batch normalization is different in evaluation"
        fix = "look for what reads self.training, and for statistics that the model keeps by hand"
    elif part == "stale":
        cause = "the running statistics are not those of the data under the final weights"
        fix = f"if this is not training data, look first at how it is prepared; else {RECALIBRATE}"
    else:
        cause = "the network relies on its batch: small, grouped or unrepresentative batches"
        fix = "larger, shuffled batches; GhostBatchNorm or synchronised statistics in training"
    return Finding(severity, evidence, cause, fix, {"part": part, **values})


ROUNDING = 1e-3


@check
def eval_mutates(evidence: Evidence) -> Iterator[Finding]:
    """Evaluation changes the model.

    Symptom: a test score that depends on how often the test was run; the test set leaks into the statistics.
    Computation: every buffer before and after one batch in evaluation, bit by bit; and the output of the same
    samples twice, for state that is not a buffer.
    Threshold: any bit of a buffer is an error. Outputs that differ by more than a thousandth of their
    standard deviation (rounding stays below) are a warning.
    Fix: update statistics only where ``self.training`` is true.
    Source: the from-scratch batch normalization of many tutorials updates its averages whenever it is called.
    """
    owners: dict[str, list[str]] = {}
    for buffer in evidence.changed_in_eval or ():
        owner, _, name = buffer.rpartition(".")
        owners.setdefault(owner, []).append(name)
    for owner, names in owners.items():
        yield Finding(
            "error",
            f"{' and '.join(names)} changed during a batch in evaluation",
            "the statistics are updated whatever self.training is, or eval() does not reach the layer",
            f"update only in training; then {RECALIBRATE}, because evaluation data is in the statistics",
            layer=owner,
        )
    if not owners and (evidence.repeats_differ or 0.0) > ROUNDING:
        yield Finding(
            "warning",
            f"the same samples give another output the second time, by {evidence.repeats_differ:.2g} of its"
            " spread",
            "state outside the buffers, such as statistics in a plain attribute or a global",
            "register the state as a buffer, and update it only in training",
        )


@check
def batch_dependence(evidence: Evidence) -> Iterator[Finding]:
    """In evaluation, a sample's output depends on the others in its batch.

    Symptom: predictions that change with the batch size; a single image gives a wrong result.
    Computation: up to eight samples in one batch, and the same samples in batches of two; the largest
    difference, divided by the standard deviation of the output. Where that is small, half of the batch is
    also replaced, which keeps its size. Of samples of different sizes only the largest is compared, in
    batches with smaller ones: what is padded to the largest of a batch may depend on that.
    Threshold: a thousandth. For other shapes PyTorch takes other kernels, which round differently, by about
    1e-6 in float32 and 1e-2 in half precision; so up to a twentieth, what vanishes in a batch of the same
    size is rounding.
    Fix: give the layers running statistics (``track_running_stats=True``, then recalibrate).
    Source: ``torch.nn.BatchNorm2d``: without running statistics the batch's are used in evaluation, too.
    """
    change = evidence.batch_dependence
    if change is None or change <= ROUNDING:
        return
    bare = [layer.name for layer in evidence.layers if layer.mean is None]
    cause, fix = "a layer mixes samples in evaluation", "find the layer that ignores eval()"
    if bare:
        cause = "no running statistics: evaluation uses the batch's"
        fix = f"create the layers with track_running_stats=True, then {RECALIBRATE}"
    found = f"outputs change by up to {change:.2g} of their spread when the batch has other samples"
    for name in bare or [""]:
        yield Finding("warning", found, cause, fix, {"change": change}, layer=name)
