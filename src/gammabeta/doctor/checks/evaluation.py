"""What evaluation must not do: change the model, or mix the samples of a batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..evidence import Evidence
from ..finding import Finding
from .registry import check

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
            "eval-mutates",
            owner,
            "error",
            f"{' and '.join(names)} changed during a batch in evaluation",
            "the statistics are updated whatever self.training is, or eval() does not reach the layer",
            "update only in training; then recalibrate, because the statistics have seen the evaluation data",
        )
    if not owners and (evidence.repeats_differ or 0.0) > ROUNDING:
        yield Finding(
            "eval-mutates",
            "",
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
    for name in bare or [""]:
        yield Finding(
            "batch-dependence",
            name,
            "warning",
            f"outputs change by up to {change:.2g} of their spread when the batch has other samples",
            "no running statistics: evaluation uses the batch's"
            if bare
            else "a layer mixes samples in evaluation",
            "use track_running_stats=True and recalibrate" if bare else "find the layer that ignores eval()",
            {"change": change},
        )
