"""Suite ``scaling``: how the cost of our training grows, what memory and how long a whole command takes.

Time per image over data sets of 6,000 to 600,000 images (MNIST, part of it or repeated) and over batches of
32 to 1,024: one epoch of the notebook's network with the mean loss, which is stable at every batch size. The
starts are ``gammabeta train`` as people type it, with an empty compilation cache and with a full one.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from . import own
from .results import Row, default_folder, read_rows, stamp, write_json

SIZES = (6_000, 60_000, 600_000)
BATCHES = (32, 64, 128, 256, 512, 1_024)
USUAL_SIZE, USUAL_BATCH = 60_000, 64

_PARTS = ("sizes", "batches", "starts")


@dataclass(frozen=True)
class Case:
    """One thing to measure: the part it belongs to, what tells it from others, and how it is run."""

    part: str
    name: str
    images: int
    batch: int | None
    run: Callable[[], own.OwnRun]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the suite's options."""
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of every case; %(default)s")
    parser.add_argument("--only", choices=_PARTS, action="append", help="this part only; may be repeated")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N", help="numbers of images")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, metavar="N", help="batch sizes")
    parser.add_argument("--append", action="store_true", help="add rounds to the results that are there")
    parser.add_argument("--results", type=Path, metavar="DIR", help=f"default: {default_folder()}")
    parser.add_argument("--timeout", type=float, default=900, metavar="S", help="for one run; %(default)s")


def run(options: argparse.Namespace) -> int:
    """Measure, and write ``scaling.json`` and ``scaling.md``; return an exit code."""
    from .scaling_report import report

    results = options.results or default_folder()
    path, stamped = results / "scaling.json", stamp()
    rows = read_rows(path, stamped["machine"]) if options.append else []
    first = 1 + max((row["round"] for row in rows), default=0)
    with TemporaryDirectory(prefix="gammabeta-bench-") as scratch:
        cases = [case for case in make_cases(options, Path(scratch)) if case.part in (options.only or _PARTS)]
        for number in range(first, first + options.rounds):
            for case in cases:
                rows.append(measure(case, number))
                write_json(path, stamped, rows)
                print(
                    f"round {number}  {case.name:24} {rows[-1]['train_seconds']:8.2f} s of training",
                    flush=True,
                )
    page = report(stamped, rows)
    (results / "scaling.md").write_text(page, "utf-8")
    print(page)
    return 0


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
        "train_seconds": seconds["train"],
        "evaluate_seconds": seconds["evaluate"],
        "process_seconds": done.seconds,
        "test_accuracy": done.result["test_accuracy"],
        "peak_rss_mb": done.peak_rss_mb,
    }


def make_cases(options: argparse.Namespace, scratch: Path) -> Iterator[Case]:
    """Yield the cases: first the starts, the cold one before the warm one, then sizes and batches."""
    counter = iter(range(1 << 30))

    def train(arguments: Sequence[str], cache: str | None = None) -> own.OwnRun:
        run = next(counter)
        variables = {}
        if cache is not None:  # Numba keeps what it compiled there
            folder = scratch / f"{cache}-{run}" if cache == "cold" else scratch / cache
            variables = {"NUMBA_CACHE_DIR": str(folder)}
        return own.train([*arguments, "--out", str(scratch / f"run-{run}")], options.timeout, variables)

    def epoch(size: int, batch: int) -> own.OwnRun:
        data = "mnist" if size == USUAL_SIZE else str(repeated_mnist(scratch, size))
        settings = ["--recipe", "classic", "--precision", options.precision, "--batch-size", str(batch)]
        steady = ["--set", "loss=mean", "--learning-rate", "0.064"]
        return train([data, *settings, *steady])

    def fast(cache: str | None) -> own.OwnRun:
        return train(["--recipe", "fast"], cache)

    yield Case("starts", "first run", USUAL_SIZE, None, lambda: fast("cold"))
    yield Case("starts", "later run", USUAL_SIZE, None, lambda: fast(None))
    for size in options.sizes:
        yield Case("sizes", f"{size:,} images", size, USUAL_BATCH, lambda n=size: epoch(n, USUAL_BATCH))
    for batch in options.batches:
        yield Case("batches", f"batch {batch:,}", USUAL_SIZE, batch, lambda n=batch: epoch(USUAL_SIZE, n))


def repeated_mnist(scratch: Path, size: int) -> Path:
    """Write MNIST's training images, cut or repeated to ``size``, as IDX files, unless they are there."""
    from ..data import load, write_idx

    folder = scratch / f"mnist-{size}"
    if folder.exists():
        return folder
    dataset = load("mnist")
    chosen = np.arange(size) % len(dataset.train)
    folder.mkdir()
    parts = (("train", dataset.train, chosen), ("t10k", dataset.test, np.arange(len(dataset.test))))
    for name, split, index in parts:
        write_idx(folder / f"{name}-images-idx3-ubyte", split.images[index, 0])
        write_idx(folder / f"{name}-labels-idx1-ubyte", split.labels[index].astype(np.uint8))
    return folder
