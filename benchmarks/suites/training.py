"""Suite ``training``: the notebook's epoch by our trainer and by its peers, interleaved, gated by accuracy.

Everyone trains the same network on the same 60,000 images for 938 steps (recipe ``classic``); the peers also
share the order of the images and the first parameters. An epoch is 938 steps with everything compiled and
loaded: what goes before is each contestant's warm-up. A process of its own each time; a round is one run of
everyone, and every round starts with another. A run whose loss or accuracy is out of bounds is not counted.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gammabeta.errors import GammabetaError, UsageError

from ..harness import Options, Result, command, report
from ..harness.digits import mnist_of
from ..peers import build
from . import peers

Row = dict[str, Any]

#: A run counts if it classifies at least this share of the test images rightly. Right work scatters down to
#: 0.979, because at the notebook's constant rate running statistics follow the last ten batches.
GATE = 0.97

#: And, with recipe ``classic``, if its moving loss, in nats, is at most this. It scatters far less (0.055 to
#: 0.066), and a mean taken for a sum, a wrong rate or wrong labels leave it far higher.
LOSS_GATE = 0.08

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
    cores = len(os.sched_getaffinity(0))
    folder = build.default_root()
    parser.add_argument("--rounds", type=int, metavar="N", help="runs of everyone; 3, or 1 with --quick")
    parser.add_argument("--only", type=_names, default=(), metavar="A,B", help="these contestants only")
    parser.add_argument("--threads", type=int, default=cores, metavar="N", help="%(default)s")
    parser.add_argument("--peers-dir", type=Path, default=folder, metavar="DIR", help="%(default)s")
    parser.add_argument("--images", type=int, default=6000, metavar="N", help="of --quick; %(default)s")
    parser.add_argument("--append", action="store_true", help="add rounds to the results that are there")
    parser.add_argument("--timeout", type=float, default=900, metavar="S", help="for one run; %(default)s")


def run(options: Options) -> Result:
    """Let everyone train, round after round; ``--quick`` trains on a part of MNIST and gates nothing."""
    from gammabeta.data import load

    from .training_report import result_of

    given = options.given
    rows = report.measured(report.stem_of("training", options.quick), options.out) if given.append else []
    if any(row["threads"] != given.threads for row in rows):
        raise UsageError(f"the results in {options.out} are of other than {given.threads} threads")
    first = 1 + max((row["round"] for row in rows), default=0)
    with TemporaryDirectory(prefix="gammabeta-bench-") as folder:
        scratch = Path(folder)
        data = mnist_of(given.images, scratch) if options.quick else "mnist"
        ours = own_contestants(scratch, data, given.timeout)
        contestants = choose(ours + peer_contestants(given, scratch), given.only)
        dataset = load(data)
        for number in range(first, first + (given.rounds or (1 if options.quick else 3))):
            peers.write_task(scratch / TASK, dataset, seed=number)
            for row in play_round(contestants, number, given.threads, gated=not options.quick):
                rows.append(row)
                options.save(result_of(rows))
    return result_of(rows)


def play_round(
    contestants: Sequence[Contestant], number: int, threads: int, *, gated: bool = True
) -> Iterator[Row]:
    """Let everyone train once, beginning with another contestant each round; a failure is a row too."""
    for place in range(len(contestants)):
        contestant = contestants[(place + number) % len(contestants)]
        row: Row = {
            "contestant": contestant.name,
            "title": contestant.title,
            "recipe": contestant.recipe,
            "precision": contestant.precision,
            "round": number,
            "threads": threads,
        }
        try:
            began = time.perf_counter()
            with peers.held_to(threads):
                row |= contestant.run(number)
            row.setdefault("process_seconds", time.perf_counter() - began)
            row["counts"] = passes(row) or not gated
        except GammabetaError as error:
            row |= {"counts": False, "error": str(error)}
        print(_line(row), flush=True)
        yield row


def passes(row: Row) -> bool:
    """Tell whether a run has done the work that was asked for, as far as its result can show."""
    # Label smoothing, in the other recipes, has another loss.
    learned = row["recipe"] != "classic" or row["moving_loss"] <= LOSS_GATE
    return bool(row["test_accuracy"] >= GATE and learned)


def own_contestants(scratch: Path, data: str, timeout: float) -> list[Contestant]:
    """Return our own trainings: the notebook's recipe in both precisions, and ours.

    ``classic`` is judged by its running statistics here, as all peers are, and not recalibrated.
    """

    def contestant(name: str, recipe: str, precision: str) -> Contestant:

        def train(seed: int) -> Row:
            settings = ["--recipe", recipe, "--precision", precision, "--seed", str(seed)]
            if recipe == "classic":
                settings += ["--set", "recalibrate=0"]
            out = str(scratch / f"{name}-{seed}")
            return own_figures(command.train([data, *settings, "--out", out], timeout))

        return Contestant(name, "gammabeta", recipe, precision, train)

    return [
        contestant("gammabeta", "classic", "fp32"),
        contestant("gammabeta-bf16", "classic", "bf16"),
        contestant("gammabeta-fast", "fast", "auto"),
    ]


def own_figures(run: command.Run) -> Row:
    """Return a row's figures from our own command's.

    The first step, which loads kernels and touches memory first, is our warm-up. As it is one of the epoch's
    steps, the epoch is the time of the others and one more like them. A training that recalibrates is what a
    user waits for: it is counted whole.
    """
    result, seconds = run.result, run.result["seconds"]
    whole = seconds["recalibrate"] > 0
    others = (seconds["train"] - seconds["first_step"]) * result["steps"] / max(result["steps"] - 1, 1)
    return {
        "precision": result["precision"],
        "images": result["images"],
        "steps": result["steps"],
        "epoch_seconds": seconds["train"] + seconds["recalibrate"] if whole else others,
        "warmup_seconds": None if whole else seconds["first_step"],
        "evaluate_seconds": seconds["evaluate"],
        "process_seconds": run.seconds,
        "moving_loss": result["loss"],
        "train_accuracy": result["train_accuracy"],
        "test_accuracy": result["test_accuracy"],
        "peak_rss_mb": run.peak_rss_mb,
    }


def peer_contestants(given: argparse.Namespace, scratch: Path) -> list[Contestant]:
    """Return the peers, in every precision that each computes in."""

    def contestant(peer: peers.Peer, precision: str) -> Contestant:
        def train(_: int) -> Row:
            return peers.run_peer(peer, given.peers_dir, scratch / TASK, precision, given.timeout)

        suffix = "" if precision == "fp32" else f"-{precision}"
        return Contestant(peer.name + suffix, peer.title, "classic", precision, train)

    every = peers.read_peers().values()
    return [contestant(peer, precision) for peer in every for precision in peer.precisions]


def choose(everyone: Sequence[Contestant], names: Sequence[str]) -> list[Contestant]:
    """Return the contestants of these names; all of them if none is given.

    Raises:
        UsageError: There is no contestant of a name.
    """
    known = [contestant.name for contestant in everyone]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"unknown contestant {unknown[0]!r}: choose from {', '.join(known)}")
    return [contestant for contestant in everyone if not names or contestant.name in names]


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _line(row: Row) -> str:
    head = f"round {row['round']}  {row['contestant']:28}"
    if "error" in row:
        return f"{head} {row['error']}"
    figures = f"{row['epoch_seconds']:8.2f} s  test {row['test_accuracy']:.4f}  loss {row['moving_loss']:.4f}"
    return f"{head} {figures}{'' if row['counts'] else '  out of bounds'}"
