"""What every peer of the training benchmark agrees on: the task it is handed and the line it prints.

The runner writes one NPZ with the images, the order in which to show them and the first value of every
parameter, so that all peers do the same arithmetic on the same batches and only their speed can differ. A
peer hands `run` a class with three methods; this module times them and prints one line of JSON. Imported in
every peer's environment, it uses only NumPy and the standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

# The recipe `classic`: the notebook's. The loss is summed over the batch, so 0.001 means 0.064 on the mean.
BATCH = 64
LEARNING_RATE = 0.001
BN_MOMENTUM = 0.1  # weight of the new value in the running statistics
BN_EPS = 1e-5
EVALUATION_BATCH = 1000  # divides every split that the runner writes, so one shape serves them all


@dataclass(frozen=True)
class Task:
    """Images (N, 28, 28) uint8, labels (N,) int64, the order of the epoch (N,), and the first parameters.

    ``initial`` maps ``conv1.weight`` (20, 1, 3, 3), ``bn1.weight`` (20,), ``conv2.weight`` (50, 20, 5, 5),
    ``dense1.weight`` (128, 800), ``dense2.weight`` (10, 128) and the rest to float32 arrays, as in PyTorch.
    """

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    order: np.ndarray
    initial: dict[str, np.ndarray]
    threads: int
    precision: str

    def batches(self) -> list[np.ndarray]:
        """Return the indices of each batch of the epoch; the last may be shorter than `BATCH`."""
        return [self.order[start : start + BATCH] for start in range(0, len(self.order), BATCH)]

    def warm_up_batches(self, steps: int = 3) -> list[np.ndarray]:
        """Return some full batches and the short last one: every shape that the epoch has."""
        batches = self.batches()
        return [*batches[:steps], *batches[-1:] * steps]

    def initial_channels_last(self) -> dict[str, np.ndarray]:
        """Return ``initial`` with (H, W, in, out) and (in, out) weights, for channels last."""
        turned = dict(self.initial)
        for name in ("conv1.weight", "conv2.weight"):
            turned[name] = turned[name].transpose(2, 3, 1, 0)
        flat = turned["dense1.weight"].reshape(128, 50, 4, 4)  # its inputs were flattened from (C, H, W)
        turned["dense1.weight"] = flat.transpose(2, 3, 1, 0).reshape(800, 128)
        turned["dense2.weight"] = turned["dense2.weight"].T
        return turned


class Trainer(Protocol):
    """What a peer implements."""

    def warm_up(self) -> None:
        """Compile all that the epoch needs, and leave the parameters as they were."""

    def epoch(self) -> np.ndarray:
        """Train one epoch, finish all work, and return the mean loss of each step."""

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Return the share of images classified rightly with the running statistics."""


def run(peer: str, make: Callable[[Task], Trainer], versions: Callable[[], dict[str, str]]) -> None:
    """Read the command line, train, evaluate, and print the result as the last line of standard output."""
    task = parse()
    started = time.perf_counter()
    trainer = make(task)
    trainer.warm_up()
    warmed = time.perf_counter()
    losses = trainer.epoch()
    trained = time.perf_counter()
    trainer.accuracy(task.test_images[:EVALUATION_BATCH], task.test_labels[:EVALUATION_BATCH])  # compiles it
    evaluating = time.perf_counter()
    train_accuracy = trainer.accuracy(task.images, task.labels)
    test_accuracy = trainer.accuracy(task.test_images, task.test_labels)
    evaluated = time.perf_counter()
    result = {
        "peer": peer,
        "precision": task.precision,
        "versions": {**versions(), "numpy": np.__version__, "python": sys.version.split()[0]},
        "threads": task.threads,
        "images": len(task.images),
        "steps": len(losses),
        "warmup_seconds": warmed - started,
        "epoch_seconds": trained - warmed,
        "evaluate_seconds": evaluated - evaluating,
        "moving_loss": moving_loss(losses),
        "train_accuracy": train_accuracy,
        "test_accuracy": test_accuracy,
        "peak_rss_mb": peak_rss_mb(),
    }
    print(json.dumps(result), flush=True)


def parse() -> Task:
    """Read the command line and the NPZ.

    The threads are the processors that this process may run on (`taskset` sets them): every peer goes by that
    count of itself, so none needs to be told in a way of its own.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("data", type=Path, help="the NPZ that the runner wrote")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    options, _ = parser.parse_known_args()
    with np.load(options.data) as archive:
        arrays = {name: archive[name] for name in archive.files}
    threads = len(os.sched_getaffinity(0))
    known = ("images", "labels", "test_images", "test_labels", "order")
    initial = {name: array for name, array in arrays.items() if name not in known}
    return Task(*(arrays[name] for name in known), initial, threads, options.precision)


def variant(*choices: str) -> str:
    """Return the value of ``--variant``: the way, among several, in which a peer is run."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--variant", choices=choices, default=choices[0])
    return str(parser.parse_known_args()[0].variant)


def moving_loss(losses: np.ndarray) -> float:
    """Return the notebook's moving average of the batch losses: 0.99 of the old value, 0.01 of the new."""
    average = float(losses[0])
    for loss in losses[1:]:
        average = 0.99 * average + 0.01 * float(loss)
    return average


def peak_rss_mb() -> float:
    """Return the most memory this process held, in MB, from the kernel's own count for it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("/proc/self/status has no VmHWM line")
