"""The peers of the training benchmark: which there are, the task they are handed, and one run of one."""

import json
import os
import subprocess
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gammabeta.data import Dataset
from gammabeta.errors import UnavailableError, UsageError

#: The peers' scripts and their table.
FOLDER = Path(__file__).resolve().parents[1] / "peers"

#: Shapes of the notebook's weights in PyTorch's layout, a bias each; and the widths of its batch norms.
_WEIGHTS = {"conv1": (20, 1, 3, 3), "conv2": (50, 20, 5, 5), "dense1": (128, 800), "dense2": (10, 128)}
_NORMS = {"bn1": 20, "bn2": 50, "bn3": 128}

#: What every peer prints, and so what a result must hold.
FIELDS = (
    "peer",
    "versions",
    "threads",
    "images",
    "steps",
    "epoch_seconds",
    "warmup_seconds",
    "evaluate_seconds",
    "moving_loss",
    "train_accuracy",
    "test_accuracy",
    "peak_rss_mb",
)


@dataclass(frozen=True)
class Peer:
    """A framework that trains the notebook's network, as ``benchmarks/peers/peers.toml`` describes it."""

    name: str
    title: str
    environment: str
    script: str
    arguments: tuple[str, ...]
    precisions: tuple[str, ...]
    variables: tuple[tuple[str, str], ...]


def read_peers() -> dict[str, Peer]:
    """Read ``peers.toml``: each peer by its name, in the order of the file."""
    table = tomllib.loads((FOLDER / "peers.toml").read_text("utf-8"))
    peers = {}
    for name, entry in table.items():
        peers[name] = Peer(
            name=name,
            title=entry["title"],
            environment=entry["environment"],
            script=entry["script"],
            arguments=tuple(entry.get("arguments", ())),
            precisions=tuple(entry.get("precisions", ("fp32",))),
            variables=tuple(entry.get("variables", {}).items()),
        )
    return peers


def interpreter(environments: Path, peer: Peer) -> Path:
    """Return the Python of a peer's environment.

    Raises:
        UnavailableError: The environment has not been built.
    """
    python = environments / peer.environment / "bin" / "python"
    if not python.exists():
        command = f"python benchmarks/peers/build.py {peer.environment} --into {environments}"
        raise UnavailableError(
            f"{peer.title} has no environment in {environments}: build it with `{command}`"
        )
    return python


def write_task(path: Path, dataset: Dataset, seed: int) -> None:
    """Write the NPZ that every peer reads: the images, the epoch's order and the first parameters.

    Weights, biases and β are drawn from N(0, 0.01) and γ from N(1, 0.01), as in the notebook.

    Raises:
        UsageError: The notebook's network does not fit the images, or a split is no multiple of 1,000.
    """
    if dataset.train.images.shape[1:] != (1, 28, 28) or len(dataset.classes) != 10:
        raise UsageError("the peers train the notebook's network: grey images of 28×28 pixels in 10 classes")
    if len(dataset.train) % 1000 or len(dataset.test) % 1000:
        raise UsageError("the peers evaluate 1,000 images at a time: give splits of a multiple of that")
    random = np.random.default_rng(seed)
    arrays: dict[str, npt.NDArray[Any]] = {
        "images": dataset.train.images[:, 0],
        "labels": dataset.train.labels,
        "test_images": dataset.test.images[:, 0],
        "test_labels": dataset.test.labels,
        "order": random.permutation(len(dataset.train)),
    }
    shapes = {**_WEIGHTS, **{name: (width,) for name, width in _NORMS.items()}}
    for name, shape in shapes.items():
        mean = 1.0 if name in _NORMS else 0.0
        arrays[f"{name}.weight"] = random.normal(mean, 0.01, shape).astype(np.float32)
        arrays[f"{name}.bias"] = random.normal(0.0, 0.01, shape[0]).astype(np.float32)
    np.savez(path, **arrays)  # type: ignore[arg-type]


def parse_result(output: str) -> dict[str, Any]:
    """Return the object on the last line of a peer's standard output.

    Raises:
        UnavailableError: The line is no such object, or a field of ``FIELDS`` is missing.
    """
    lines = output.strip().splitlines()
    try:
        result = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        result = None
    if not isinstance(result, dict):
        raise UnavailableError("it printed no result")
    missing = [field for field in FIELDS if field not in result]
    if missing:
        raise UnavailableError(f"its result lacks {', '.join(missing)}")
    return result


@contextmanager
def held_to(threads: int) -> Iterator[None]:
    """Hold this process, and so those it starts, to that many processors; afterwards give the others back.

    Raises:
        UsageError: There are fewer.
    """
    before = os.sched_getaffinity(0)
    if threads > len(before):
        raise UsageError(f"{threads} threads were asked for and {len(before)} processors are here")
    os.sched_setaffinity(0, sorted(before)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def run_process(
    command: Sequence[str], variables: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end.

    Raises:
        UnavailableError: It failed or took longer than ``timeout`` seconds; the last line it wrote says why.
    """
    environment = {**os.environ, **variables}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"it took longer than {timeout:.0f} s") from None
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UnavailableError(f"it ended with code {done.returncode}: {why[:200]}")
    return done


def run_peer(peer: Peer, environments: Path, task: Path, precision: str, timeout: float) -> dict[str, Any]:
    """Let a peer train once in a process of its own and return what it printed.

    Raises:
        UnavailableError: It has no environment, failed, took too long or printed no result.
    """
    script = [str(interpreter(environments, peer)), str(FOLDER / peer.script), str(task)]
    command = [*script, "--precision", precision, *peer.arguments]
    return parse_result(run_process(command, dict(peer.variables), timeout).stdout)
