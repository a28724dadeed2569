"""Suite ``training``: the notebook's epoch by our trainer and by its peers, interleaved, gated by accuracy.

Everyone trains the same network on the same 60,000 images for 938 steps (recipe ``classic``); the peers also
share the order of the images and the first parameters. A process of its own each time; a round is one run of
everyone, and every round starts with another. A run with a test accuracy below the gate is not counted.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ..errors import GammabetaError, UsageError
from . import own, peers
from .results import Row, default_folder, read_rows, stamp, write_json

if TYPE_CHECKING:
    from ..data import Dataset

#: A run counts if it classifies at least this share of the test images rightly.
GATE = 0.98

#: The file that the peers read, written anew for each round.
TASK = "task.npz"


@dataclass(frozen=True)
class Contestant:
    """Someone who can train: a name, a title, the recipe, and a function of the seed to a row's figures."""

    name: str
    title: str
    recipe: str
    precision: str
    run: Callable[[int], Row]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the suite's options."""
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of everyone; %(default)s")
    parser.add_argument("--only", type=_names, default=(), metavar="A,B", help="these contestants only")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument(
        "--peers-dir", type=Path, default=peers.environments_folder(), metavar="DIR", help="%(default)s"
    )
    parser.add_argument(
        "--images", type=int, metavar="N", help="a trial on the first N images, without a gate"
    )
    parser.add_argument("--append", action="store_true", help="add rounds to the results that are there")
    parser.add_argument("--results", type=Path, metavar="DIR", help=f"default: {default_folder()}")
    parser.add_argument("--timeout", type=float, default=900, metavar="S", help="for one run; %(default)s")
    parser.add_argument("--list", action="store_true", help="name the contestants and do nothing")


def run(options: argparse.Namespace) -> int:
    """Measure, and write ``training.json``, ``training.md`` and ``training.png``; return an exit code."""
    from .training_report import write_report

    if options.images is not None and options.results is None:
        raise UsageError("--images is a trial, kept apart from the results: name a folder with --results")
    results = options.results or default_folder()
    with TemporaryDirectory(prefix="gammabeta-bench-") as scratch, peers.held_to(options.threads):
        contestants = _chosen(options, Path(scratch))
        if options.list:
            print("\n".join(f"{c.name:32} {c.title}" for c in contestants))
            return 0
        stamped, path = stamp(), results / "training.json"
        rows = read_rows(path, stamped["machine"]) if options.append else []
        dataset = prepare(Path(scratch), options.images)
        first = 1 + max((row["round"] for row in rows), default=0)
        for number in range(first, first + options.rounds):
            peers.write_task(Path(scratch) / TASK, dataset, seed=number)
            for row in play_round(contestants, number, GATE if options.images is None else 0.0):
                rows.append(row)
                write_json(path, stamped, rows)
                print(_line(row), flush=True)
    print(write_report(results, stamped, rows))
    return 0 if all(row["counts"] for row in rows) else 1


def prepare(scratch: Path, images: int | None) -> "Dataset":
    """Return the data set; for a part of MNIST, write it as IDX files too, for our own command to read."""
    from ..data import Dataset, Split, load, write_idx

    dataset = load("mnist")
    if images is not None:
        part = Split(dataset.train.images[:images].copy(), dataset.train.labels[:images])
        dataset = Dataset(dataset.name, part, dataset.test, dataset.classes)
    if images is not None:
        folder = scratch / "mnist"
        folder.mkdir()
        for name, split in (("train", dataset.train), ("t10k", dataset.test)):
            write_idx(folder / f"{name}-images-idx3-ubyte", split.images[:, 0])
            write_idx(folder / f"{name}-labels-idx1-ubyte", split.labels.astype("uint8"))
    return dataset


def play_round(contestants: Sequence[Contestant], number: int, gate: float) -> list[Row]:
    """Let everyone train once, beginning with another contestant each round; a failure is a row too."""
    rows = []
    for place in range(len(contestants)):
        contestant = contestants[(place + number) % len(contestants)]
        row: Row = {
            "contestant": contestant.name,
            "title": contestant.title,
            "recipe": contestant.recipe,
            "precision": contestant.precision,
            "round": number,
        }
        try:
            began = time.perf_counter()
            row |= contestant.run(number)
            row.setdefault("process_seconds", time.perf_counter() - began)
            row["counts"] = row["test_accuracy"] >= gate
        except GammabetaError as error:
            row |= {"counts": False, "error": str(error)}
        rows.append(row)
    return rows


def own_contestants(scratch: Path, images: int | None, timeout: float) -> list[Contestant]:
    """Return our own trainings: the notebook's recipe in both precisions, and ours."""
    data = "mnist" if images is None else str(scratch / "mnist")

    def contestant(name: str, recipe: str, precision: str) -> Contestant:

        def train(seed: int) -> Row:
            settings = ["--recipe", recipe, "--precision", precision, "--seed", str(seed)]
            return own_figures(
                own.train([data, *settings, "--out", str(scratch / f"{name}-{seed}")], timeout)
            )

        return Contestant(name, "gammabeta", recipe, precision, train)

    return [
        contestant("gammabeta", "classic", "fp32"),
        contestant("gammabeta-bf16", "classic", "bf16"),
        contestant("gammabeta-fast", "fast", "auto"),
    ]


def own_figures(run: own.OwnRun) -> Row:
    """Return a row's figures from our own command's; its warm-up is inside its training time."""
    result, seconds = run.result, run.result["seconds"]
    return {
        "precision": result["precision"],
        "images": result["images"],
        "steps": result["steps"],
        "epoch_seconds": seconds["train"] + seconds["recalibrate"],
        "warmup_seconds": None,
        "evaluate_seconds": seconds["evaluate"],
        "process_seconds": run.seconds,
        "moving_loss": result["loss"],
        "train_accuracy": result["train_accuracy"],
        "test_accuracy": result["test_accuracy"],
        "peak_rss_mb": run.peak_rss_mb,
    }


def peer_contestants(options: argparse.Namespace, scratch: Path) -> list[Contestant]:
    """Return the peers of the checkout, in every precision that each computes in; none outside a checkout."""
    folder = peers.checkout_folder()
    if folder is None:
        print("The peers' scripts are in the repository's benchmarks/peers; only gammabeta is measured here.")
        return []

    def contestant(peer: peers.Peer, precision: str) -> Contestant:
        def train(_: int) -> Row:
            return peers.run_peer(peer, folder, options.peers_dir, scratch / TASK, precision, options.timeout)

        suffix = "" if precision == "fp32" else f"-{precision}"
        return Contestant(peer.name + suffix, peer.title, "classic", precision, train)

    every = peers.read_peers(folder).values()
    return [contestant(peer, precision) for peer in every for precision in peer.precisions]


def _chosen(options: argparse.Namespace, scratch: Path) -> list[Contestant]:
    everyone = own_contestants(scratch, options.images, options.timeout) + peer_contestants(options, scratch)
    known = [contestant.name for contestant in everyone]
    unknown = [name for name in options.only if name not in known]
    if unknown:
        raise UsageError(f"unknown contestant {unknown[0]!r}: choose from {', '.join(known)}")
    return [c for c in everyone if not options.only or c.name in options.only]


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _line(row: Row) -> str:
    head = f"round {row['round']}  {row['contestant']:28}"
    if "error" in row:
        return f"{head} {row['error']}"
    figures = f"{row['epoch_seconds']:8.2f} s  test {row['test_accuracy']:.4f}  loss {row['moving_loss']:.4f}"
    return f"{head} {figures}{'' if row['counts'] else '  below the gate'}"
