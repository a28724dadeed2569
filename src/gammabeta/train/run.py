"""The folder a training leaves behind: what was asked, what happened, and the weights."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self, TextIO

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from ..errors import RunError, UsageError
from .files import fit_weights, load_weights, read_json, save_weights, write_atomically
from .provenance import provenance
from .recipe import Recipe, load_recipe
from .tensorboard import Board

_INFO, _RECIPE, _METRICS, _LOCK = "run.json", "recipe.toml", "metrics.jsonl", ".lock"
_WEIGHTS, _BEST = "model.safetensors", "best.safetensors"

Status = Literal["running", "finished", "interrupted", "failed"]


class NetworkInfo(BaseModel):
    """What it takes to build the network again and to feed it."""

    model_config = ConfigDict(extra="forbid")

    factory: str | None = Field(
        default=None, max_length=500
    )  # None: the digit network; else "module:function"
    channels: int = Field(ge=1, le=4096)
    height: int = Field(ge=1, le=1 << 14)
    width: int = Field(ge=1, le=1 << 14)
    classes: list[str] = Field(min_length=2, max_length=100_000)
    pixel_mean: list[float] = Field(max_length=4096)  # in units of the uint8 pixel, per channel
    pixel_scale: list[float] = Field(max_length=4096)
    batch_norm: bool = True
    hidden_bias: bool = True
    eps: float = Field(default=1e-5, gt=0)


class RunInfo(BaseModel):
    """The content of ``run.json``."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    status: Status
    created: str
    finished: str | None = None
    seed: int
    device: str
    precision: Literal["fp32", "bf16"]
    data: str
    data_sha256: str | None = None
    holdout: int = 0
    network: NetworkInfo
    provenance: dict[str, Any]
    result: dict[str, Any] | None = None


class Run:
    """A run folder. ``create`` makes one to write; ``open`` reads one that is there.

    ======================  ============================================================================
    ``run.json``            status, seed, data, network, the code, versions and machine, the result
    ``recipe.toml``         every setting; ``--recipe RUN/recipe.toml`` trains the same again
    ``metrics.jsonl``       an object a line: ``{"kind": "progress" | "evaluation" | "statistics", ...}``
    ``model.safetensors``   parameters and buffers, with ``network`` of run.json as metadata
    ``best.safetensors``    the same at the epoch that was judged best, where several were judged
    ``checkpoints/``        what it takes to go on after an interruption
    ``curves.png``          loss and accuracy
    ``statistics.png``      each batch-norm layer's statistics over time
    ======================  ============================================================================
    """

    def __init__(self, path: Path, info: RunInfo, recipe: Recipe) -> None:
        self.path, self.info, self.recipe = path, info, recipe
        self.board: Board | None = None
        self._lock: FileLock | None = None
        self._metrics: TextIO | None = None

    @classmethod
    def create(cls, path: Path, info: dict[str, Any], recipe: Recipe) -> Self:
        """Make the folder and take it for this process alone.

        Raises:
            RunError: The folder holds something already, is in use, or cannot be written.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunError(f"{path} is there already: choose another folder with --out")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot make {path}: {error.strerror}; choose another folder with --out"
            ) from None
        created = RunInfo(status="running", created=_now(), provenance=provenance(), **info)
        run = cls(path, created, recipe)
        run._take()
        write_atomically(path / _RECIPE, recipe.to_toml().encode())
        run._save_info()
        run._metrics = (path / _METRICS).open("a", encoding="utf-8")
        return run

    def reopen(self, metrics_bytes: int) -> None:
        """Take an opened folder to go on writing; metrics past ``metrics_bytes`` are dropped.

        Raises:
            RunError: It is finished, in use, or cannot be written.
        """
        self._take()
        self.info = Run.open(self.path).info  # as whoever had it last left it
        if self.info.status == "finished":
            self._release()
            raise RunError(f"{self.path} is finished: there is nothing to resume")
        self.info = self.info.model_copy(update={"status": "running", "finished": None})
        self._save_info()
        self._metrics = (self.path / _METRICS).open("a", encoding="utf-8")
        self._metrics.truncate(metrics_bytes)

    @property
    def metrics_bytes(self) -> int:
        """How long ``metrics.jsonl`` is."""
        return (self.path / _METRICS).stat().st_size

    def _take(self) -> None:
        lock = FileLock(self.path / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(f"{self.path} is being written by another process") from None
        except OSError as error:
            raise RunError(
                f"cannot write to {self.path}: {error.strerror}; choose another folder with --out"
            ) from None
        self._lock = lock

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a run folder for reading.

        Raises:
            RunError: There is no such folder, it is not a run, or its documents are damaged.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise RunError(f"there is no run folder {folder}: `gammabeta train --out {folder}` makes one")
        if not (folder / _INFO).is_file():
            raise RunError(f"{folder} is not a run folder: it holds no {_INFO}")
        try:
            info = RunInfo.model_validate(read_json(folder / _INFO))
            recipe = load_recipe(folder / _RECIPE)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "document"
            raise RunError(f"{folder / _INFO} is damaged: {field}: {first['msg'].lower()}") from None
        except UsageError as error:
            raise RunError(f"{folder / _RECIPE} is damaged: {error}") from None
        return cls(folder, info, recipe)

    def record(self, kind: str, **values: Any) -> None:
        """Append a line to ``metrics.jsonl`` and flush it."""
        if self._metrics is None:
            raise RunError(f"{self.path} was opened for reading")
        if self.board is not None:
            self.board.record(kind, values, values["step"])
        try:
            self._metrics.write(json.dumps({"kind": kind, **values}) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise RunError(f"cannot write {self.path / _METRICS}: {error.strerror}") from None

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of ``metrics.jsonl``; a last line cut short by a crash is left out."""
        path = self.path / _METRICS
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise RunError(f"{path} is missing or damaged") from None
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError, RecursionError):
                if number < len(lines):
                    raise RunError(f"{path} is damaged in line {number}") from None
        return rows

    def save_model(self, model: nn.Module, *, best: bool = False) -> None:
        """Write parameters and buffers, and what it takes to build the network, into one file."""
        metadata = {"gammabeta": self.info.network.model_dump_json()}
        save_weights(self._weights(best), dict(model.state_dict()), metadata)

    def load_model(self, model: nn.Module, *, best: bool = False) -> nn.Module:
        """Read the weights, the last or the best, into a network built from ``info.network``.

        Raises:
            WeightsError: The file is missing or damaged, or does not fit the network.
        """
        tensors, _ = load_weights(self._weights(best))
        return fit_weights(model, tensors, self._weights(best))

    def finish(self, status: Status, result: dict[str, Any] | None = None) -> None:
        """Write how it ended, and let go of the folder."""
        self.info = self.info.model_copy(update={"status": status, "finished": _now(), "result": result})
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self.board is not None:
            self.board.close()
        try:
            self._save_info()
        finally:
            self._release()

    def _save_info(self) -> None:
        write_atomically(self.path / _INFO, (self.info.model_dump_json(indent=2) + "\n").encode())

    def _weights(self, best: bool) -> Path:
        return self.path / (_BEST if best else _WEIGHTS)


def default_path(recipe: str, data: str) -> Path:
    """Return a fresh folder name under ``runs/``."""
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{recipe}-{Path(data).stem or 'data'}"
    path, number = Path("runs") / stem, 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{stem}-{number}"
    return path


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
