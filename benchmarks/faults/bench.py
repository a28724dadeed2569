"""Precision and recall of the doctor's checks, on healthy models and on models with one fault each.

``python -m benchmarks.faults.bench --seeds 5`` prints the table; ``--write FILE`` puts it into a page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gammabeta.doctor import Report, diagnose
from gammabeta.doctor.checks import CHECKS

from ..harness.report import write_between
from . import ranks
from .injections import FAULTS, Fault
from .subjects import Subject, subjects

BEGIN, END = "<!-- fault bench: begin -->", "<!-- fault bench: end -->"


@dataclass(frozen=True)
class Trial:
    """One diagnosis: of which subject, with which fault (None: healthy), and what fired how severely."""

    seed: int
    subject: str
    fault: Fault | None
    fired: frozenset[tuple[str, str]]

    @property
    def caught(self) -> bool:
        """Whether the fault's own check fired, at least as severely as it must."""
        assert self.fault is not None
        order = ("error", "warning", "note")
        must = order.index(self.fault.severity)
        return any(check == self.fault.check and order.index(how) <= must for check, how in self.fired)

    @property
    def false_alarms(self) -> set[str]:
        """Checks that gave an error or a warning that neither the fault nor its consequences explain."""
        loud = {check for check, how in self.fired if how != "note"}
        return loud - ({self.fault.check} | self.fault.implies if self.fault is not None else set())


def examine(subject: Subject) -> Report:
    """The diagnosis with everything that the subject offers."""
    return diagnose(
        subject.model,
        subject.loader(),
        loss=subject.loss,
        optimizer=subject.optimizer,
        source=subject.source,
    )


def trials(seed: int, only: Collection[str] | None = None) -> Iterator[Trial]:
    """Every subject, healthy and with every fault that applies; ``only`` names the subjects to look at."""
    for subject in subjects(seed, only):
        yield _trial(seed, subject, None)
        for fault in FAULTS:
            ill = fault.inject(subject.copy(), seed)
            if ill is not None:
                yield _trial(seed, ill, fault)


def distributed_trials(seed: int) -> Iterator[Trial]:
    """The same over two processes: healthy, with small unsynchronised batches, with buffers that differ."""
    for fault, fired in ranks.run(seed):
        yield Trial(seed, "two processes", fault, fired)


def _trial(seed: int, subject: Subject, fault: Fault | None) -> Trial:
    fired = frozenset((finding.check, finding.severity) for finding in examine(subject))
    return Trial(seed, subject.name, fault, fired)


def table(results: list[Trial]) -> str:
    """Markdown: per check, faults injected, caught, false alarms in all diagnoses, recall and precision."""
    healthy = [trial for trial in results if trial.fault is None]
    loud = sum(bool(trial.false_alarms) for trial in healthy)
    names = ", ".join(sorted({trial.subject for trial in healthy}))
    ill, seeds = len(results) - len(healthy), len({trial.seed for trial in results})
    lines = [
        f"{len(results)} diagnoses over {seeds} seeds: {len(healthy)} of healthy models ({names}), {loud} of"
        f" them with an error or a warning; {ill} of the same models with one fault each.",
        "",
        "| check | injected | caught | recall | false alarms | precision |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for check in CHECKS:
        mine = [trial for trial in results if trial.fault is not None and trial.fault.check == check]
        caught = sum(trial.caught for trial in mine)
        alarms = sum(check in trial.false_alarms for trial in results)
        recall = f"{caught / len(mine):.3f}" if mine else "–"
        precision = f"{caught / (caught + alarms):.3f}" if caught + alarms else "–"
        lines.append(f"| `{check}` | {len(mine)} | {caught} | {recall} | {alarms} | {precision} |")
    return "\n".join(lines)


def failures(results: list[Trial]) -> list[str]:
    """What was missed, and what fired without reason, in words."""
    lines = []
    for trial in results:
        what = trial.fault.name if trial.fault is not None else "healthy"
        if trial.fault is not None and not trial.caught:
            lines.append(
                f"seed {trial.seed}, {trial.subject}, {what}: {trial.fault.check} missed; {set(trial.fired)}"
            )
        if trial.false_alarms:
            lines.append(f"seed {trial.seed}, {trial.subject}, {what}: false {sorted(trial.false_alarms)}")
    return lines


def run(seed: int, keep: Path | None) -> list[Trial]:
    """All trials of a seed; taken from, or put into, a file in the folder ``keep``."""
    faults = {fault.name: fault for fault in (*FAULTS, *(case for case, _ in ranks.CASES)) if fault}
    path = keep / f"seed-{seed}.json" if keep is not None else None
    if path is not None and path.exists():
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [
            Trial(
                seed, subject, faults[name] if name else None, frozenset((check, how) for check, how in fired)
            )
            for subject, name, fired in rows
        ]
    results = [*trials(seed), *distributed_trials(seed)]
    if path is not None:
        rows = [(t.subject, t.fault.name if t.fault else None, sorted(t.fired)) for t in results]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows), encoding="utf-8")
    return results


def main() -> None:
    """Run the bench from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--keep", type=Path, help="a folder for each seed's results: what is there is not run again"
    )
    parser.add_argument("--write", type=Path, help="a Markdown file with the bench's two marks")
    options = parser.parse_args()
    torch.set_num_threads(1)  # small models: more threads only wait for one another
    results = [trial for seed in range(options.seeds) for trial in run(seed, options.keep)]
    text = table(results)
    print(text)
    for line in failures(results):
        print(line)
    if options.write is not None:
        write_between(options.write, BEGIN, END, text)


if __name__ == "__main__":
    main()
