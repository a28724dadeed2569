"""Trackers, which hand a training's numbers on to a dashboard: TensorBoard, Weights & Biases, trackio.

A tracker gets each record of ``metrics.jsonl`` as numbers by name. Its package is imported when asked for.
"""

from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ..errors import UnavailableError, UsageError, installing
from .documents import warn


class Tracker(Protocol):
    """Where the numbers of a training go beside its run folder."""

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Take the numbers of a step."""

    def finish(self) -> None:
        """Write what is still in memory."""


class _TensorBoard:
    """Scalars in ``RUN/tensorboard``."""

    def __init__(self, run: Path, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run / "tensorboard"), flush_secs=5)

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


def _started(package: str, run: Path, settings: dict[str, Any]) -> Tracker:
    """Weights & Biases, or trackio, which has its functions; the environment says where they write."""
    started: Tracker = import_module(package).init(project="gammabeta", name=run.name, config=settings)
    return started


TRACKERS: dict[str, Callable[[Path, dict[str, Any]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": partial(_started, "wandb"),
    "trackio": partial(_started, "trackio"),
}


class Trackers:
    """All trackers of a run. One that fails is told and left out: none is worth a training."""

    def __init__(self, names: Iterable[str], run: Path, settings: dict[str, Any]) -> None:
        self._all: dict[str, Tracker] = {}
        for name in names:
            self._try(name, partial(self._start, name, run, settings))

    def record(self, kind: str, values: dict[str, Any]) -> None:
        """Hand on a record of ``metrics.jsonl``."""
        numbers = scalars(kind, values)
        for name, tracker in list(self._all.items()):
            self._try(name, partial(tracker.log, numbers, values["step"]))

    def finish(self) -> None:
        """Let all of them write what they hold."""
        for name, tracker in list(self._all.items()):
            self._try(name, tracker.finish)

    def _start(self, name: str, run: Path, settings: dict[str, Any]) -> None:
        self._all[name] = TRACKERS[name](run, settings)

    def _try(self, name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            self._all.pop(name, None)
            warn(f"{name} gets no more numbers: {type(error).__name__}: {error}")


def check_trackers(names: Iterable[str]) -> list[str]:
    """Return the names; raise if one is not known, or its package is not installed."""
    wanted = list(dict.fromkeys(names))
    for name in wanted:
        if name not in TRACKERS:
            raise UsageError(f"unknown tracker {name!r}: choose from {', '.join(TRACKERS)}")
        if find_spec(name) is None:
            raise UnavailableError(f"{name} is not installed: {installing(name)}")
    return wanted


def scalars(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record by name, such as ``evaluation/test/accuracy``."""
    if kind == "statistics":
        parts = {layer: _with_percentiles(figures) for layer, figures in values["layers"].items()}
    else:
        parts = {values.get("split", ""): {name: value for name, value in values.items() if name != "step"}}
    return {
        "/".join(filter(None, (kind, part, name))): value
        for part, figures in parts.items()
        for name, value in figures.items()
        if isinstance(value, int | float)
    }


def _with_percentiles(figures: dict[str, Any]) -> dict[str, Any]:
    names = ("percentile_15", "percentile_50", "percentile_85")
    return figures | dict(zip(names, figures["percentiles"], strict=True))
