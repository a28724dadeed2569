"""``eval-mutates``: evaluation changes the model.

Symptom: a test score that depends on how often one has tested; the test set leaks into the statistics.
Computation: every buffer before and after one batch in evaluation, bit by bit; and the output of the same
samples twice, for state that is not a buffer.
Threshold: any bit of a buffer is an error. Outputs that differ by more than a thousandth of their standard
deviation (rounding stays below) are a warning.
Fix: update statistics only where ``self.training`` is true.
Source: the from-scratch batch normalization of many tutorials updates its averages whenever it is called.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..evidence import Evidence
from ..finding import Finding
from ._registry import check

ROUNDING = 1e-3


@check("eval-mutates")
def eval_mutates(evidence: Evidence) -> Iterator[Finding]:
    """Buffers or outputs that evaluation changes."""
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
            "the statistics are updated without looking at self.training, or eval() does not reach the layer",
            "update only in training; then recalibrate, for the statistics have seen the evaluation data",
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
