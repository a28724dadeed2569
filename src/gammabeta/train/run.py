"""The run folder of a training: what was asked for, what happened, and the weights."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any, Literal, Self, TextIO, cast

import tomli_w
from filelock import FileLock, Timeout
from torch import Tensor, nn

from .. import data
from ..data import Dataset, Preparation, Split, picture_style
from ..data.dataset import hold_out_training
from ..data.download import Progress
from ..data.preparation import earlier, earlier_training
from ..errors import RunError, UsageError
from ..files import (
    check_values,
    fit_weights,
    load_weights,
    make_folder,
    reporting,
    serialize,
    write_atomically,
)
from ..jsontext import to_json
from ..text import for_shell, stored
from .documents import CheckpointInfo, Extension, HoldoutRule, RunInfo, read_run_info
from .metrics import cut_metrics, read_metrics
from .provenance import provenance
from .recipe import Recipe, run_recipe
from .source import find, storable_source
from .trackers import Trackers

_INFO, _RECIPE, _METRICS, _LOCK = "run.json", "recipe.toml", "metrics.jsonl", ".lock"
_WEIGHTS, _BEST = "model.safetensors", "best.safetensors"

_AUGMENTATION = ("shift", "flip", "crop", "rotation", "color", "mixup_alpha")
Status = Literal["running", "finished", "interrupted", "failed"]


@dataclass(frozen=True)
class Job:
    """What to train."""

    source: str  # name or path of the data set
    recipe: Recipe
    seed: int = 0  # of initialisation, order and augmentation
    holdout: int = 0  # how many of the training images are used in place of the test images
    size: tuple[int, int] | None = None  # (H, W) to which a folder's pictures are resized; None: as they are
    device: str = "auto"  # or cpu, cuda, cuda:<index>
    preparation: Preparation | None = None  # of a folder's pictures; None: learned from them
    place: str | None = None  # where a run's data were; None: only ``source`` is known
    skip_damaged: bool = False  # pass over pictures that cannot be read
    holdout_rule: HoldoutRule = "classes"  # held out of each class, by the seed; or the last, as 0.1.0 did
    init: str | None = None  # a run folder with whose weights to begin, or a file; None: with random ones
    model: str | None = None  # the network, timm:NAME or module:function; None: the recipe's

    def load(self, progress: Progress | None = None) -> Dataset:
        """Load the data set; ``progress`` is called during a download, as in ``gammabeta.data.load``."""
        options: dict[str, Any] = {"size": self.size, "skip_damaged": self.skip_damaged, "progress": progress}
        where = find(self.source, self.place)
        return self.held(data.load(where, preparation=self.preparation, **options)).settled()

    def held(self, dataset: Dataset) -> Dataset:
        """The data set with some of its training images held out, if the job holds any out."""
        if not self.holdout:
            return dataset
        if self.holdout_rule == "last":
            return hold_out(dataset, self.holdout)
        return hold_out_training(dataset, self.holdout, self.seed)


def hold_out(dataset: Dataset, count: int) -> Dataset:
    """Return the data set with the last ``count`` training images in place of the test images.

    Runs of 0.1.0 held out so. It is unfit for data in an order: see `hold_out_training`.
    """
    images, labels = dataset.train.images, dataset.train.labels
    if not 0 < count < len(labels):
        raise UsageError(f"cannot hold out {count} of {len(labels)} training images")
    kept, held = Split(images[:-count], labels[:-count]), Split(images[-count:], labels[-count:])
    return replace(dataset, train=kept, test=held)


class Run:
    """A run folder. ``create`` makes one to write; ``open`` reads one that is there.

    ======================  ============================================================================
    ``run.json``            status, seed, data, network, the code, versions and machine, the result
    ``recipe.toml``         every setting; ``--recipe RUN/recipe.toml`` trains the same again
    ``metrics.jsonl``       an object a line: ``{"kind": "progress" | "evaluation" | "statistics", ...}``
    ``model.safetensors``   parameters and buffers, with ``network`` of run.json as metadata
    ``best.safetensors``    the same at the epoch with the lowest test loss, where several were evaluated
    ``checkpoints/``        what is needed to continue after an interruption
    ``run.html``            a page with all there is to see
    ======================  ============================================================================
    """

    def __init__(self, path: Path, info: RunInfo, recipe: Recipe) -> None:
        self.path, self.info, self.recipe = path, info, recipe
        self.trackers: Trackers | None = None
        self._ignored: dict[str, Any] = {}  # fields of recipe.toml that a later version added
        self._lock = FileLock(path / _LOCK)
        self._metrics: TextIO | None = None

    @classmethod
    def create(cls, path: Path, info: dict[str, Any], recipe: Recipe) -> Self:
        """Make the folder and lock it; ``RunError`` if it holds something or cannot be written."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunError(f"{path} is there already: choose another folder with --out")
        make_folder(path)
        created = RunInfo(status="running", created=_now(), provenance=provenance(), **info)
        run = cls(path, created, recipe)
        run._acquire()
        write_atomically(path / _RECIPE, recipe.to_toml().encode())
        run._save_info()
        run._metrics = (path / _METRICS).open("a", encoding="utf-8")
        return run

    def lock(self) -> None:
        """Lock an opened folder to write it further, and read what another process may have written since."""
        self._acquire()
        self.info = read_run_info(self.path / _INFO)

    def unlock(self) -> None:
        """Let other processes write the folder again."""
        self._lock.release()

    def reopen(self, standing: CheckpointInfo | None, images_per_epoch: int, recipe: Recipe) -> str | None:
        """Write a locked folder further: from a checkpoint, with a recipe whose epochs may be others.

        Later metrics are dropped. Returns a message if these are damaged.
        """
        if recipe != self.recipe:
            step = standing.step if standing is not None else 0
            before = Extension(step=step, epochs=self.recipe.epochs, result=self.info.result)
            self.info = self.info.model_copy(update={"extended": [*self.info.extended, before]})
            self.recipe = recipe
            content = tomli_w.dumps(recipe.model_dump() | self._ignored)
            write_atomically(self.path / _RECIPE, content.encode())
        again = {"status": "running", "finished": None, "result": None, "failure": None}
        self.info = self.info.model_copy(update=again)
        self._save_info()
        message = cut_metrics(self.path / _METRICS, standing, images_per_epoch)
        self._metrics = (self.path / _METRICS).open("a", encoding="utf-8")
        return message

    @property
    def job(self) -> Job:
        """What the run trains, its images of the size that the network takes."""
        info, network = self.info, self.info.network
        size = (network.height, network.width)
        read = network.preparation
        if read is None and network.channels in (1, 3):
            read = earlier_training(network.channels, size)
        job = Job(stored(info.data), self.recipe, info.seed, info.holdout, size, info.device, read)
        place = stored(info.data_path or info.data)
        init = None if info.init is None else stored(info.init.run)
        job = replace(job, place=place, init=init, model=network.model)
        return replace(job, skip_damaged=info.skip_damaged, holdout_rule=info.holdout_rule)

    def calibrated(self, temperature: float) -> None:
        """Note the temperature of predictions, for every document that describes the network."""
        network = self.info.network.model_copy(update={"temperature": temperature})
        self.info = self.info.model_copy(update={"network": network})

    def move_data(self, source: str) -> None:
        """Write down that the data are found elsewhere now."""
        name = self.info.data_name or (self.info.data if self.info.data in data.known_names() else None)
        self.info = self.info.model_copy(update={**storable_source(source), "data_name": name})
        self._save_info()

    @property
    def preparation(self) -> Preparation:
        """How a picture becomes the network's input: as in training; in a run of 0.1.0 as it was there."""
        network = self.info.network
        if network.preparation is not None:
            return network.preparation
        style = picture_style(self.info.data_name or stored(self.info.data), network.channels)
        return earlier(network.channels, (network.height, network.width), style)

    @property
    def metrics_bytes(self) -> int:
        """Length of ``metrics.jsonl``; 0 if it is missing."""
        path = self.path / _METRICS
        return path.stat().st_size if path.is_file() else 0

    def _acquire(self) -> None:
        for name in (_LOCK, "checkpoints"):
            if (self.path / name).is_symlink():  # would be written through, to wherever it leads
                raise RunError(f"{self.path / name} is a link: put what it leads to in its place")
        with reporting(f"write to {self.path}", "; choose another folder with --out"):
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise RunError(f"{self.path} is being written by another process") from None

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a run folder for reading; ``RunError`` if it is missing, not a run, or damaged."""
        folder = Path(path)
        if folder.is_file():
            raise RunError(f"{folder} is a file, not a run folder")
        if not folder.is_dir():
            raise RunError(
                f"there is no run folder {folder}: `gammabeta train --out {for_shell(folder)}` makes one"
            )
        if not (folder / _INFO).is_file():
            raise RunError(f"{folder} is not a run folder: it holds no {_INFO}")
        info = read_run_info(folder / _INFO)
        recipe, ignored = run_recipe(folder / _RECIPE)
        run = cls(folder, info, recipe)
        run._ignored = ignored
        return run

    def record(self, kind: str, **values: Any) -> None:
        """Append a line to ``metrics.jsonl`` and flush it."""
        if self._metrics is None:
            raise RunError(f"{self.path} was opened for reading")
        if self.trackers is not None:
            self.trackers.record(kind, values)
        with reporting(f"write {self.path / _METRICS}"):
            self._metrics.write(to_json({"kind": kind, **values}) + "\n")
            self._metrics.flush()

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of ``metrics.jsonl``; damaged ones are left out, with a warning."""
        return read_metrics(self.path / _METRICS)

    def save_model(self, model: nn.Module, *, best: bool = False) -> None:
        """Write parameters and buffers, and what is needed to build the network, into one file."""
        self.save_weights(model.state_dict(), best=best)

    def save_weights(self, tensors: Mapping[str, Tensor], *, best: bool = False) -> None:
        """Write the parameters and buffers of a model, as ``save_model`` does."""
        metadata = {"gammabeta": to_json(self.info.network.model_dump())}
        write_atomically(self.weights(best), serialize(tensors, metadata))

    def load_model(self, model: nn.Module, *, best: bool = False) -> nn.Module:
        """Read the last or best weights into a network; ``WeightsError`` if damaged or for another one."""
        tensors, _ = load_weights(self.weights(best))
        fit_weights(model, tensors, self.weights(best))
        check_values(tensors, self.weights(best))
        return model

    def finish(
        self, status: Status, result: dict[str, Any] | None = None, failure: str | None = None
    ) -> None:
        """Write how it ended, and unlock the folder; ``failure``: why, if it failed."""
        ended = {"status": status, "finished": _now(), "result": result, "failure": failure}
        self.info = self.info.model_copy(update=ended)
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self.trackers is not None:
            self.trackers.finish()
        try:
            self._save_info()
        finally:
            self._lock.release()

    def _save_info(self) -> None:
        write_atomically(self.path / _INFO, (to_json(self.info.model_dump(), indent=2) + "\n").encode())

    def weights(self, best: bool = False) -> Path:
        """The file with the last or the best weights."""
        return self.path / (_BEST if best else _WEIGHTS)


def incomparable(runs: Sequence[Run]) -> list[str]:
    """Return what in the figures of several runs cannot be compared, a sentence each."""
    told = []
    if len({(run.info.data_sha256, run.info.holdout) for run in runs}) > 1:
        told.append("accuracies and test losses are not comparable: the runs have other images")
    smoothed = [run for run in runs if run.info.loss == "objective" and run.recipe.label_smoothing]
    if smoothed and len(runs) > 1:
        names = ", ".join(str(run.path) for run in smoothed)
        told.append(
            f"training losses are not comparable: of {names} they are smoothed, as earlier versions had it"
        )
    augmentation = [[getattr(run.recipe, name) for name in _AUGMENTATION] for run in runs]
    if any(each != augmentation[0] for each in augmentation):
        told.append("training losses are not comparable: they are of images that were augmented differently")
    return told


def comparison(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return for each run its name, status, figures, and the settings in which the runs differ."""
    settings = [run.recipe.model_dump() | {"seed": run.info.seed, "data": run.info.data} for run in runs]
    differing = [field for field in settings[0] if len({str(each[field]) for each in settings}) > 1]
    table = []
    for run, own in zip(runs, settings, strict=True):
        result = cast("dict[str, Any]", run.info.result or {})
        figures = ("test_accuracy", "train_accuracy", "test_loss", "loss", "images_per_second")
        table.append(
            {
                "run": str(run.path),
                "status": run.info.status,
                **{figure: result.get(figure) for figure in figures},
                "train_seconds": result.get("seconds", {}).get("train"),
                "settings": {field: own[field] for field in differing},
            }
        )
    return table


def default_path(recipe: str, data: str) -> Path:
    """Return a fresh folder name under ``runs/``."""
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{_safe(recipe)}-{_safe(Path(data).stem)}"
    names = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
    return next(path for name in names if not (path := Path("runs") / name).exists())


def _safe(name: str) -> str:
    """A name as part of a file's name on any system: no separators, and not long."""
    return re.sub(r"[^\w.-]+", "_", name)[:30] or "data"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
