"""Evaluation: its loss against training's; and that it neither changes the model nor mixes samples."""

import math
from collections.abc import Iterator
from statistics import fmean, stdev

import torch

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
    comes from dropout and the like, which make training worse; a fourth above the first, beyond the same
    thresholds, is a finding whoever made the layer. Modules that are no batch normalization known here, but
    keep statistics in training, are in training with it in the second mode. Third minus second is
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
    total = evaluation - bn_train
    scale = max(abs(bn_train), TINY)
    stale, noise = evaluation - population, population - bn_train
    part, differences = ("stale", gap.stale) if stale >= noise else ("noise", gap.noise)
    if total > SHARE * scale and _certain(differences):
        yield _finding(
            part,
            "error" if total > SEVERE * scale else "warning",
            f"loss {evaluation:.4g} in evaluation, {bn_train:.4g} with batch statistics:"
            f" stale statistics {stale:+.3g}, batch noise {noise:+.3g}",
            {"evaluation": evaluation, "bn_train": bn_train, "stale": stale, "noise": noise},
            own,
        )
    elif gap.overall and gap.train is not None and math.isfinite(gap.train):
        apart = evaluation - gap.train
        scale = max(abs(gap.train), TINY)
        if apart > SHARE * scale and _certain(gap.overall):
            yield _finding(
                "elsewhere",
                "error" if apart > SEVERE * scale else "warning",
                f"loss {evaluation:.4g} in evaluation, {gap.train:.4g} in training, of which the known batch"
                f" normalization makes {total:+.3g}",
                {"evaluation": evaluation, "train": gap.train},
                own,
            )


def _by_output(gap: Gap, own: tuple[str, ...]) -> Iterator[Finding]:
    for part, change, between in (
        ("stale", gap.output_change, "the stored and exact"),
        ("noise", gap.output_noise, "exact and batch"),
    ):
        if change > SHARE:
            severity: Severity = "error" if change > SEVERE else "warning"
            found = f"{change:.0%} of the output's variance changes between {between} statistics"
            yield _finding(part, severity, found, {"change": change}, own)


def _certain(differences: tuple[float, ...]) -> bool:
    """Whether the batches agree: all positive, or their mean several standard errors above zero."""
    if len(differences) < 2 or all(difference > 0 for difference in differences):
        return True
    return fmean(differences) > ERRORS * stdev(differences) / math.sqrt(len(differences))


def _finding(
    part: str,
    severity: Severity,
    evidence: str,
    values: dict[str, float | int | str],
    own: tuple[str, ...],
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
        fix = "recalibrate: gammabeta.recalibrate(model, loader)"
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
            "update only in training; then recalibrate, because the statistics have seen the evaluation data",
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


SINGLE, HALF = 1e-3, 0.05


@check
def batch_dependence(evidence: Evidence) -> Iterator[Finding]:
    """In evaluation, a sample's output depends on the others in its batch.

    Symptom: predictions that change with the batch size; a single image gives a wrong result.
    Computation: up to eight samples in one batch, and the same samples in batches of two; the largest
    difference, divided by the standard deviation of the output.
    Threshold: a thousandth in float32, a twentieth in half precision: for other shapes PyTorch takes other
    kernels, which round differently, by about 1e-6 and 1e-2.
    Fix: give the layers running statistics (``track_running_stats=True``, then recalibrate).
    Source: ``torch.nn.BatchNorm2d``: without running statistics the batch's are used in evaluation, too.
    """
    change = evidence.batch_dependence
    half = any(layer.parameter_dtype in (torch.float16, torch.bfloat16) for layer in evidence.layers)
    if change is None or change <= (HALF if half else SINGLE):
        return
    bare = [layer.name for layer in evidence.layers if layer.mean is None]
    cause, fix = "a layer mixes samples in evaluation", "find the layer that ignores eval()"
    if bare:
        cause = "no running statistics: evaluation uses the batch's"
        fix = "use track_running_stats=True and recalibrate"
    found = f"outputs change by up to {change:.2g} of their spread when the batch has other samples"
    for name in bare or [""]:
        yield Finding("warning", found, cause, fix, {"change": change}, layer=name)
