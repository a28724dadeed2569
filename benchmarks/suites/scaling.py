"""Suite ``scaling``: how the cost of our training grows, what memory and how long a whole command takes.

Time per image over data sets of 6,000 to 600,000 images (MNIST, part of it or repeated) and over batches of
32 to 1,024: one epoch of the notebook's network with the mean loss, which is stable at every batch size. The
starts are ``gammabeta train`` as people type it, with an empty compilation cache and with a full one.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..harness import Options, Result, command, report
from ..harness.digits import mnist_of

SIZES = (6_000, 60_000, 600_000)
BATCHES = (32, 64, 128, 256, 512, 1_024)
USUAL_SIZE, USUAL_BATCH = 60_000, 64

Row = dict[str, Any]

_PARTS = ("sizes", "batches", "starts")


@dataclass(frozen=True)
class Case:
    """One thing to measure: the part it belongs to, what tells it from others, and how it is run."""

    part: str
    name: str
    images: int
    batch: int | None
    run: Callable[[], command.Run]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the suite's options."""
    parser.add_argument("--rounds", type=int, metavar="N", help="runs of every case; 3, or 1 with --quick")
    parser.add_argument("--only", choices=_PARTS, action="append", help="this part only; may be repeated")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="%(default)s")
    parser.add_argument("--append", action="store_true", help="add rounds to the results that are there")
    parser.add_argument("--timeout", type=float, default=900, metavar="S", help="for one run; %(default)s")


def run(options: Options) -> Result:
    """Measure every case, round after round; ``--quick`` leaves out what takes longest."""
    from .scaling_report import result_of

    given = options.given
    rows = report.measured(report.stem_of("scaling", options.quick), options.out) if given.append else []
    first = 1 + max((row["round"] for row in rows), default=0)
    sizes, batches = (SIZES[:1], BATCHES[-1:]) if options.quick else (SIZES, BATCHES)
    with TemporaryDirectory(prefix="gammabeta-bench-") as folder:
        cases = make_cases(Path(folder), sizes, batches, given.precision, given.timeout)
        chosen = [case for case in cases if case.part in (given.only or _PARTS)]
        for number in range(first, first + (given.rounds or (1 if options.quick else 3))):
            for case in chosen:
                rows.append(measure(case, number))
                print(f"round {number}  {case.name:24} {rows[-1]['train_seconds']:8.2f} s", flush=True)
                options.save(result_of(rows))
    return result_of(rows)


def measure(case: Case, number: int) -> Row:
    """Run a case once."""
    done = case.run()
    seconds = done.result["seconds"]
    return {
        "part": case.part,
        "case": case.name,
        "size": case.images,
        "batch": case.batch,
        "round": number,
        "precision": done.result["precision"],
        "images": done.result["images"],
        "steps": done.result["steps"],
        "train_seconds": seconds["train"],
        "first_step_seconds": seconds["first_step"],
        "evaluate_seconds": seconds["evaluate"],
        "process_seconds": done.seconds,
        "test_accuracy": done.result["test_accuracy"],
        "peak_rss_mb": done.peak_rss_mb,
    }


def make_cases(
    scratch: Path, sizes: Sequence[int], batches: Sequence[int], precision: str, timeout: float
) -> Iterator[Case]:
    """Yield the cases: first the starts, the cold one before the warm one, then sizes and batches."""
    counter = iter(range(1 << 30))

    def train(arguments: Sequence[str], cold: bool = False) -> command.Run:
        run = next(counter)
        # An empty folder to look for compiled kernels in: the first run compiles them.
        variables = {"NUMBA_CACHE_DIR": str(scratch / f"compiled-{run}")} if cold else {}
        return command.train([*arguments, "--out", str(scratch / f"run-{run}")], timeout, variables)

    def epoch(size: int, batch: int) -> command.Run:
        settings = ["--recipe", "classic", "--precision", precision, "--batch-size", str(batch)]
        steady = ["--set", "loss=mean", "--learning-rate", "0.064"]
        return train([mnist_of(size, scratch), *settings, *steady])

    def fast(cold: bool) -> command.Run:
        return train(["--recipe", "fast"], cold)

    yield Case("starts", "first run", USUAL_SIZE, None, partial(fast, True))
    yield Case("starts", "later run", USUAL_SIZE, None, partial(fast, False))
    for size in sizes:
        yield Case("sizes", f"{size:,} images", size, USUAL_BATCH, partial(epoch, size, USUAL_BATCH))
    for batch in batches:
        yield Case("batches", f"batch {batch:,}", USUAL_SIZE, batch, partial(epoch, USUAL_SIZE, batch))
