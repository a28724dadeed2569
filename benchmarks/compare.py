"""``python benchmarks/compare.py OTHER_CHECKOUT``: is this checkout as fast as another, and as right?

The same cases run on both, in fresh processes that take turns: in every round each suite runs once on either
checkout, in random order. A process warms up, then times its cases in rounds of its own. A case's ratio is
the median over rounds of the other checkout's time by this one's, so 1.10 means that this one is a tenth
faster; a suite's is the geometric mean over its cases. Before anything is timed, both run every case once:
kernels are compiled then, and results that differ by more than rounding stop the comparison.

``kernels``, ``models``, ``inference`` and ``small`` are the cases of ``compare_cases.py``; ``train`` is the
whole command ``gammabeta train --recipe fast``. Compare a checkout with itself to see what noise makes of 1.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import RESULTS, IncorrectError, Result, command, report
from benchmarks.harness.machine import commit
from gammabeta.errors import GammabetaError, UnavailableError, UsageError

ROOT = Path(__file__).resolve().parents[1]
#: Rounds within a process, of the suites whose cases a process times itself.
INNER_ROUNDS = {"kernels": 11, "models": 9, "inference": 31, "small": 31}
SUITES = (*INNER_ROUNDS, "train")
TOLERANCE = 1e-3  # relative, of a sum over a tensor: kernels may add in another order

Times = Mapping[str, float]  # seconds of every case


@dataclass(frozen=True)
class Pair:
    """One round of a suite: the times of the other checkout (old) and of this one (new)."""

    old: Times
    new: Times


def ratios(pairs: Sequence[Pair]) -> dict[str, list[float]]:
    """Old by new of every case, round by round; above 1 the new one is faster."""
    return {case: [pair.old[case] / pair.new[case] for pair in pairs] for case in pairs[0].new}


def means(pairs: Sequence[Pair]) -> list[float]:
    """The geometric mean of all cases, round by round."""
    return [geometric_mean(column) for column in zip(*ratios(pairs).values(), strict=True)]


def summary(pairs: Sequence[Pair]) -> str:
    """The geometric mean of a suite's cases, its range over rounds, and the least and the greatest case."""
    usual, each = {case: median(values) for case, values in ratios(pairs).items()}, means(pairs)
    least, greatest = min(usual, key=usual.__getitem__), max(usual, key=usual.__getitem__)
    return (
        f"old / new: geometric mean {geometric_mean(usual.values()):.3f} (single rounds {min(each):.3f} to "
        f"{max(each):.3f}), least {usual[least]:.3f} ({least}), greatest {usual[greatest]:.3f} ({greatest})"
    )


def rows(suite: str, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """A row for each case of a suite."""
    return [
        {
            "suite": suite,
            "case": case,
            "old": _time(median(pair.old[case] for pair in pairs)),
            "new": _time(median(pair.new[case] for pair in pairs)),
            "old / new": f"{median(values):.3f}",
            "single rounds": f"{min(values):.3f} to {max(values):.3f}",
        }
        for case, values in ratios(pairs).items()
    ]


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3f} s"
    return f"{seconds * 1e3:.4g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.4g} µs"


def same_results(old: Mapping[str, list[float]], new: Mapping[str, list[float]]) -> int:
    """Count the cases equal to the bit, as far as a sum over each tensor tells; refuse wrong results."""
    for case, sums in new.items():
        for a, b in zip(old[case], sums, strict=True):
            # A gradient that batch norm cancels is rounding on both sides: it counts as zero.
            if not abs(a - b) <= TOLERANCE * max(abs(a), abs(b), 1.0):
                raise IncorrectError(f"{case}: a sum over a result is {b:.6g}, on the other checkout {a:.6g}")
    return sum(old[case] == sums for case, sums in new.items())


def environment(checkout: Path, threads: int | None) -> dict[str, str]:
    """The variables under which Python imports the package of that checkout."""
    return {"PYTHONPATH": str(checkout / "src")} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})


def run_cases(suite: str, rounds: int, checkout: Path, variables: Mapping[str, str]) -> dict[str, Any]:
    """Run a suite's cases in a process of their own; return what it printed."""
    program = [sys.executable, str(ROOT / "benchmarks" / "compare_cases.py"), suite, str(rounds)]
    done = subprocess.run(program, env={**os.environ, **variables}, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UnavailableError(f"{suite} failed on {checkout}: {why}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if Path(found["checkout"]) != checkout:
        raise UnavailableError(f"{suite} was to use the package of {checkout} and used {found['checkout']}")
    return found


def run_train(variables: Mapping[str, str]) -> Times:
    """Train once by the recipe ``fast``."""
    with tempfile.TemporaryDirectory() as folder:
        done = command.train(["--recipe", "fast", "--out", str(Path(folder) / "run")], 600, variables)
    seconds = done.result["seconds"]
    training = seconds["train"] + seconds["recalibrate"]
    return {"gammabeta train, whole process": done.seconds, "gammabeta train, training": training}


def play(suite: str, checkouts: Sequence[Path], order: random.Random, threads: int | None) -> Pair:
    """One round: the suite on both checkouts, in random order."""
    times: dict[int, Times] = {}
    for side in order.sample((0, 1), 2):
        variables = environment(checkouts[side], threads)
        if suite == "train":
            times[side] = run_train(variables)
        else:
            times[side] = run_cases(suite, INNER_ROUNDS[suite], checkouts[side], variables)["seconds"]
    return Pair(times[0], times[1])


def warm_up(suite: str, checkouts: Sequence[Path], threads: int | None) -> str:
    """Compile what the suite needs on both checkouts, and compare the results; say how they compare."""
    both = [environment(checkout, threads) for checkout in checkouts]
    if suite == "train":
        for variables in both:
            run_train(variables)
        return "not compared"
    old, new = (run_cases(suite, 0, c, v)["sums"] for c, v in zip(checkouts, both, strict=True))
    return f"{same_results(old, new)} of {len(new)} cases equal to the bit, the others within {TOLERANCE}"


def compare(other: Path, suites: Sequence[str], rounds: int, threads: int | None = None) -> Result:
    """Run the suites on both checkouts and return the comparison."""
    checkouts, order = (other, ROOT), random.Random(0)
    found: dict[str, list[Pair]] = {suite: [] for suite in suites}
    results = {f"{suite}, results": warm_up(suite, checkouts, threads) for suite in suites}
    for number in range(rounds):
        for suite in order.sample(suites, len(suites)):
            found[suite].append(play(suite, checkouts, order, threads))
            (mean,) = means(found[suite][-1:])
            print(f"round {number + 1}  {suite:10} old / new: {mean:.3f}", flush=True)
    note = (
        f"Old is commit {commit(other)}, new is {commit(ROOT)}: {rounds} rounds of fresh processes in turn, "
        f"{threads or 'the usual number of'} threads each. Above 1 the new one is faster. Times are medians "
        "over rounds, ratios the median of each round's."
    )
    return Result(
        title=f"{commit(ROOT)} compared with {commit(other)}",
        rows=[row for suite, pairs in found.items() for row in rows(suite, pairs)],
        summary={suite: summary(pairs) for suite, pairs in found.items()} | results,
        notes=[note],
        measured=[{"suite": suite} | vars(pair) for suite, pairs in found.items() for pair in pairs],
    )


def main() -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(description="compare the speed of this checkout with another's")
    parser.add_argument("other", type=Path, help="the other checkout's folder")
    parser.add_argument("--suite", action="append", choices=SUITES, help="repeatable; default: all")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="%(default)s")
    parser.add_argument("--threads", type=int, metavar="N", help="of each process; default: torch's choice")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="%(default)s")
    given = parser.parse_args()
    try:
        other = given.other.resolve()
        if not (other / "src" / "gammabeta").is_dir() or given.rounds < 1:
            raise UsageError(f"give a checkout of gammabeta (is {given.other} one?) and at least one round")
        result = compare(other, list(dict.fromkeys(given.suite or SUITES)), given.rounds, given.threads)
    except GammabetaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for path in report.write(f"compare-{commit(other)}-{commit(ROOT)}", result, given.out):
        print(path)
    for key, value in result.summary.items():
        print(f"{key}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
