"""Checkpoints: everything a training needs to continue, complete or absent, and known to be undamaged.

A checkpoint is two files in ``RUN/checkpoints``: ``step-<n>.safetensors`` with the tensors and, written after
it, ``step-<n>.json`` with the plain values and the SHA-256 of both. One without the other, or with a wrong
checksum, is not used. The two newest are kept.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ..errors import RunError, WeightsError
from ..files import check_values, load_weights, make_folder, read_json, reporting, serialize, write_atomically
from ..jsontext import finite
from .documents import CheckpointInfo, complaint
from .evaluate import Evaluation
from .loop import State, Training
from .run import Run

_KEPT = 2  # the newest, and the one before it in case the newest turns out damaged
_NAME = re.compile(r"step-([0-9]{1,18})\.json")


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run: Path) -> None:
        self._folder = run / "checkpoints"

    def save(self, state: State) -> None:
        """Write a checkpoint, then drop those no longer needed; a ``RunError`` leaves these as they were."""
        make_folder(self._folder)
        step = int(state.values["step"])
        content = serialize(state.tensors)
        tensors, document = self._files(step)
        write_atomically(tensors, content)
        body = {"tensors_sha256": hashlib.sha256(content).hexdigest(), "values": finite(state.values)}
        write_atomically(document, json.dumps({**body, "sha256": _digest(body)}).encode())
        self._drop_old()

    def load(self, check: Callable[[State], None] = lambda _: None) -> tuple[State | None, list[str]]:
        """Return the newest undamaged checkpoint, if any, and a message on each newer one.

        ``check`` raises a ``WeightsError`` for a state that does not fit.
        """
        passed: list[str] = []
        for step in reversed(self.steps()):
            try:
                state = self._read(step)
                check(state)
            except (RunError, WeightsError) as error:
                passed.append(f"checkpoint of step {step} is damaged and passed over: {error}")
            else:
                return state, passed
        return None, passed

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, intact or damaged, in order."""
        if not self._folder.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self._folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def _read(self, step: int) -> State:
        tensors, path = self._files(step)
        document = read_json(path)
        claimed = document.pop("sha256", None) if isinstance(document, dict) else None
        if claimed is None or claimed != _digest(document):
            raise RunError(f"{path} does not match its checksum")
        with reporting(f"read {tensors}"):
            digest = hashlib.sha256(tensors.read_bytes()).hexdigest()
        if digest != document.get("tensors_sha256"):
            raise RunError(f"{tensors} does not match its checksum")
        try:
            info = CheckpointInfo.model_validate(document.get("values"))
        except ValidationError as error:
            raise RunError(f"{path}: {complaint(error)}") from None
        if info.step != step:
            raise RunError(f"{path} is of step {info.step}")
        return State(load_weights(tensors)[0], info.model_dump())

    def _drop_old(self) -> None:
        kept = {path for step in self.steps()[-_KEPT:] for path in self._files(step)}
        for path in self._folder.glob("step-*"):  # a process killed between the two files leaves one of them
            if path not in kept:
                with suppress(OSError):
                    path.unlink()

    def _files(self, step: int) -> tuple[Path, Path]:
        """The tensors of a step, and its document."""
        return self._folder / f"step-{step}.safetensors", self._folder / f"step-{step}.json"


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class Checkpointer:
    """Writes a training's checkpoints and its best weights into a run folder, and restores the training.

    ``every``: seconds between checkpoints. ``state``: the one to continue from; None: start anew. The best
    weights, and the last good ones in case the training diverges, are kept in memory in between: a short
    epoch costs less than a file that is flushed to the disk.
    """

    def __init__(self, run: Run, every: float, state: State | None = None) -> None:
        self._run, self._every, self._state = run, every, state
        self._checkpoints = Checkpoints(run.path)
        self._last = time.monotonic()
        best = None if state is None or not run.weights(best=True).exists() else state.values["best_loss"]
        self._best = float("inf") if best is None else float(best)
        self._best_weights: dict[str, Tensor] | None = None
        self._good: list[tuple[int, dict[str, Tensor]]] = []

    def restore(self, training: Training) -> float:
        """Restore the state, if there is one; return the seconds of training that it took."""
        if self._state is None:
            return 0.0
        training.restore(self._state)
        return float(self._state.values["seconds"])

    def save(self, training: Training, seconds: float, *, now: bool = False) -> None:
        """Write a checkpoint if it is time to, or in any case if ``now``; ``seconds`` of training so far."""
        if not now and time.monotonic() - self._last < self._every:
            return
        self.write_best()
        state = training.state()
        best = self._best if self._best < float("inf") else None
        more: dict[str, Any] = {
            "seconds": seconds,
            "metrics_bytes": self._run.metrics_bytes,
            "best_loss": best,
        }
        more |= {"recipe": self._run.recipe.model_dump(), "seed": self._run.info.seed}
        self._checkpoints.save(State(state.tensors, state.values | more))
        self._last = time.monotonic()

    def keep_if_best(self, training: Training, test: Evaluation) -> None:
        """Keep the weights if no epoch had a lower test loss, and several epochs are evaluated."""
        if test.loss < self._best and training.order.steps_per_epoch < training.steps:
            self._best_weights = _copied(training)
        self._best = min(self._best, test.loss)

    def write_best(self) -> None:
        """Write the best weights if they are not on the disk yet."""
        if self._best_weights is not None:
            self._run.save_weights(self._best_weights, best=True)
            self._best_weights = None

    def keep_if_good(self, training: Training) -> None:
        """Keep the weights if all of them are finite: what is left if the training diverges."""
        weights = _copied(training)
        with suppress(WeightsError):
            check_values(weights, "the training")
            self._good = [*self._good[-1:], (training.step, weights)]

    def write_good(self, steps: int) -> int | None:
        """Write the last good weights, of so many steps at most, as the run's; return their step, if any."""
        self.write_best()
        for step, weights in reversed(self._good):
            if step <= steps:
                self._run.save_weights(weights)
                return step
        return None


def _copied(training: Training) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: tensor.detach().clone() for name, tensor in training.model.state_dict().items()}
