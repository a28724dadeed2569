"""Checkpoints: everything a training needs to go on, whole or not there, and known to be undamaged.

A checkpoint is two files in ``RUN/checkpoints``: ``step-<n>.safetensors`` with the tensors and, written after
it, ``step-<n>.json`` with the plain values and the SHA-256 of both. One without the other, or with a wrong
checksum, does not count. The two newest are kept.
"""

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ..errors import RunError, WeightsError
from .files import load_weights, make_folder, read_json, write_atomically

_KEPT = 2  # the newest, and the one before it in case the newest turns out damaged
_NAME = re.compile(r"step-(\d+)\.json")


@dataclass(frozen=True)
class State:
    """A training put down between two steps: tensors by name, and plain JSON values."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run: Path) -> None:
        self._folder = run / "checkpoints"

    def save(self, state: State) -> None:
        """Write a checkpoint of step ``state.values["step"]``, then drop those no longer needed.

        Raises:
            RunError: It cannot be written; the earlier ones are as they were.
        """
        make_folder(self._folder)
        step = int(state.values["step"])
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
        content = save(plain)
        write_atomically(self._tensors(step), content)
        body = {"tensors_sha256": hashlib.sha256(content).hexdigest(), "values": state.values}
        write_atomically(self._document(step), json.dumps({**body, "sha256": _digest(body)}).encode())
        self._drop_old()

    def load(self) -> tuple[State | None, list[str]]:
        """Return the newest undamaged checkpoint (None if there is none) and a word on each passed over."""
        passed: list[str] = []
        for step in reversed(self.steps()):
            try:
                return self._read(step), passed
            except (RunError, WeightsError) as error:
                passed.append(f"checkpoint of step {step} is damaged and passed over: {error}")
        return None, passed

    def steps(self) -> list[int]:
        """Return the steps of which there is a checkpoint, whole or damaged, in order."""
        if not self._folder.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self._folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def _read(self, step: int) -> State:
        path = self._document(step)
        document = read_json(path)
        claimed = document.pop("sha256", None) if isinstance(document, dict) else None
        if claimed is None or claimed != _digest(document):
            raise RunError(f"{path} does not match its checksum")
        tensors = self._tensors(step)
        try:
            digest = hashlib.sha256(tensors.read_bytes()).hexdigest()
        except OSError as error:
            raise RunError(f"cannot read {tensors}: {error.strerror}") from None
        if digest != document["tensors_sha256"]:
            raise RunError(f"{tensors} does not match its checksum")
        return State(load_weights(tensors)[0], document["values"])

    def _drop_old(self) -> None:
        steps = self.steps()
        for step in steps[:-_KEPT]:
            for path in (self._document(step), self._tensors(step)):
                with suppress(OSError):
                    path.unlink()
        alive = {self._tensors(step).name for step in self.steps()}
        for path in self._folder.glob("step-*.safetensors"):  # left by a process killed between the two files
            if path.name not in alive:
                with suppress(OSError):
                    path.unlink()

    def _tensors(self, step: int) -> Path:
        return self._folder / f"step-{step}.safetensors"

    def _document(self, step: int) -> Path:
        return self._folder / f"step-{step}.json"


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
