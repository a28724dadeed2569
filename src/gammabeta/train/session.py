"""A training with its run folder: started, resumed or followed, recorded, and readable however it ends."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import Dataset
from ..errors import DataError, DivergedError, RunError
from .batches import Scaling, batch_starts
from .checkpoint import Checkpointer
from .documents import InitialWeights, NetworkInfo, warn
from .evaluate import Evaluation, LayerStatistics
from .fitting import Observer, Outcome, TrainingInterrupted, build_network, fit
from .loop import Progress
from .network import DigitNetwork
from .plots import curves, save_figure, statistics
from .provenance import torchrun_job
from .recipe import Recipe
from .resume import Resumption, warm_start
from .run import Events, Job, Run, check_tensorboard
from .world import ALONE, AnotherFailed, World, resolve_device, resolve_precision

CHECKPOINT_SECONDS = 30.0
WATCH_POINTS = 16  # measurements of the batch-norm layers in a training


def train_run(
    dataset: Dataset,
    job: Job,
    path: Path,
    observer: Observer,
    *,
    checkpoint_every: float = CHECKPOINT_SECONDS,
    tensorboard: bool = False,
    world: World = ALONE,
) -> tuple[Run, Outcome]:
    """Train the digit network on a data set, which ``job.load()`` gave, into a new run folder ``path``.

    ``checkpoint_every``: seconds between checkpoints within an epoch. This process is rank 0 of ``world``,
    and the others ``follow``. After a ``TrainingInterrupted``, because the observer asked to stop, the folder
    holds a checkpoint and the weights so far.
    """
    place = resolve_device(world.device(job.device))
    network, init = _start(job, dataset, observer.tell)
    info = {
        "seed": job.seed,
        "device": str(place),
        "precision": resolve_precision(job.recipe.precision, place),
        "data": job.source,
        "data_sha256": dataset_sha256(dataset),
        "holdout": job.holdout,
        "network": describe(dataset, job.recipe),
        "init": init,
    }
    if tensorboard:
        check_tensorboard()
    run = Run.create(path, info, job.recipe)
    if tensorboard:
        run.events = Events(path)
    return run, _fit_and_record(run, network, dataset, observer, Checkpointer(run, checkpoint_every), world)


def resume_run(
    begun: Path | Resumption,
    dataset: Dataset,
    observer: Observer,
    *,
    tell: Callable[[str], None],
    checkpoint_every: float = CHECKPOINT_SECONDS,
    world: World = ALONE,
) -> tuple[Run, Outcome]:
    """Continue an interrupted run: the weights become bitwise those of a run without the interruption.

    That holds on the same machine with the same number of threads. ``begun`` is the run's folder, or what
    ``Resumption.of`` gave, for another number of epochs say. ``tell`` is called with messages: the step it
    continues from, a damaged checkpoint, other threads. The number of processes may differ from before.
    ``RunError`` if it is not a run, is finished, changed or in use; ``DataError`` if the data have changed.
    """
    resumed = Resumption.of(begun) if isinstance(begun, Path) else begun
    run, state = resumed.run, resumed.state
    if run.info.data_sha256 != dataset_sha256(dataset):
        raise DataError(f"{run.info.data} is not what {run.path} was trained on: it has changed since")
    job, init = run.job, run.info.init
    if state is not None:
        job = replace(job, init=None)  # its weights are in the checkpoint
    network, _ = _start(job, dataset, tell, None if init is None else init.sha256)
    for message in resumed.begin(len(dataset.train.labels)):
        tell(message)
    checkpointer = Checkpointer(run, checkpoint_every, state)
    return run, _fit_and_record(run, network, dataset, observer, checkpointer, world)


def _start(
    job: Job, dataset: Dataset, tell: Callable[[str], None], sha256: str | None = None
) -> tuple[DigitNetwork, InitialWeights | None]:
    """Build the network that a training begins with; its weights are random, or those of another run."""
    network = build_network(job.recipe, dataset, job.seed)
    if job.init is None:
        return network, None
    init, message = warm_start(network, job.init, list(dataset.classes), sha256)
    tell(message)
    return network, init


def follow(world: World, stop: Callable[[], bool]) -> None:
    """Train as a rank other than 0, which says what to train; write nothing.

    ``stop`` is asked after each step whether all shall stop. ``DataError`` if rank 0 has other data.
    """
    orders: tuple[Job, str, dict[str, torch.Tensor] | None] | None = world.broadcast(None)
    if orders is None:
        return
    job, sha256, weights = orders
    dataset = job.load()
    if dataset_sha256(dataset) != sha256:
        raise DataError(f"{job.source} is not the data set that rank 0 has under this name")
    observer = Observer()
    observer.stop_requested = stop  # type: ignore[method-assign]
    network = build_network(job.recipe, dataset, job.seed)
    if weights is not None:
        network.load_state_dict(weights)
    try:
        _fit(job, network, dataset, observer=observer, world=world)
    except DivergedError:  # all ranks notice at the same step; rank 0 has the weights, and speaks
        raise AnotherFailed from None


def _fit(job: Job, network: DigitNetwork, dataset: Dataset, **options: Any) -> Outcome:
    options |= {"device": job.device, "seed": job.seed, "watch_points": WATCH_POINTS}
    return fit(network, dataset, job.recipe, **options)


def begun_before(out: Path | None, job: Job) -> Path | None:
    """Return the run that this job of ``torchrun`` began before its workers were restarted, if any.

    When a worker dies, ``torchrun --max-restarts`` starts all of them again with the same command line. A run
    folder says which job of torchrun began it. So a restarted job continues its own interrupted run, and no
    other one, and only if recipe, data, seed and held-out images are the same. ``out`` is the folder asked
    for; None: look through ``runs/``.
    """
    mine = torchrun_job()
    if mine is None:
        return None
    wanted = (job.recipe, job.source, job.seed, job.holdout)
    for path in [out] if out is not None else sorted(Path("runs").glob("*"), reverse=True):
        try:
            run = Run.open(path)
        except RunError:
            continue
        has = (run.recipe, run.info.data, run.info.seed, run.info.holdout)
        if has == wanted and _same_job(run.info.provenance.get("torchrun"), mine):
            return path
    return None


def _same_job(theirs: Any, mine: dict[str, str]) -> bool:
    if not isinstance(theirs, dict) or theirs.get("run_id") != mine["run_id"]:
        return False
    if theirs.get("host") == mine["host"]:
        return theirs.get("agent") == mine["agent"]
    return mine["run_id"] != "none"  # rank 0 has moved to another machine


def _fit_and_record(
    run: Run,
    network: DigitNetwork,
    dataset: Dataset,
    observer: Observer,
    checkpointer: Checkpointer,
    world: World,
) -> Outcome:
    job = run.job
    if world.size > 1:  # each rank has a GPU of its own: say "cuda" and not which
        job = replace(job, device=job.device.partition(":")[0])
    try:
        world.broadcast((job, run.info.data_sha256, network.state_dict() if job.init else None))
        recorder = _Recorder(run, len(dataset.train.labels), observer)
        outcome = _fit(job, network, dataset, observer=recorder, checkpointer=checkpointer, world=world)
        run.save_model(outcome.model)
        checkpointer.write_best()
        draw_curves(run)
        run.finish("finished", result_of(outcome))
    except TrainingInterrupted:
        run.save_model(network)
        draw_curves(run)
        run.finish("interrupted")
        raise
    except KeyboardInterrupt:
        run.finish("interrupted")
        raise
    except DivergedError as error:
        message = f"{error}{_saved_good(run, checkpointer, error.steps)}"
        draw_curves(run)
        run.finish("failed", failure=message)
        raise DivergedError(message, error.steps) from None
    except BaseException as error:
        with suppress(RunError):  # a full disk, say: the first error is the one to tell
            checkpointer.write_best()
        with suppress(RunError):
            run.finish("failed", failure=f"{type(error).__name__}: {error}"[:500])
        raise
    return outcome


def _saved_good(run: Run, checkpointer: Checkpointer, steps: int) -> str:
    """Save the last good weights of a training that diverged; return where they are, in words."""
    try:
        step = checkpointer.write_good(steps)
    except RunError as error:
        return f"; {error}"
    return "" if step is None else f"; the weights after step {step:,} are in {run.weights()}"


class _Recorder(Observer):
    """An observer that writes ``metrics.jsonl`` and passes everything on to another."""

    def __init__(self, run: Run, images: int, then: Observer) -> None:
        self._run, self._then = run, then
        self._steps_per_epoch = len(batch_starts(images, run.recipe.batch_size))
        self._step = 0

    def _write(self, kind: str, **values: Any) -> None:
        place = {"step": self._step, "epochs": round(self._step / self._steps_per_epoch, 4)}
        self._run.record(kind, **place, **values)

    def progressed(self, progress: Progress, seconds: float) -> None:
        self._step = progress.step
        figures = {name: getattr(progress, name) for name in ("images", "loss", "accuracy", "learning_rate")}
        self._write("progress", **figures, seconds=round(seconds, 3))
        self._then.progressed(progress, seconds)

    def evaluated(self, epoch: int, split: str, result: Evaluation, seconds: float) -> None:
        figures = {name: getattr(result, name) for name in ("accuracy", "loss", "correct", "count")}
        self._write("evaluation", epoch=epoch, split=split, **figures, seconds=round(seconds, 3))
        self._then.evaluated(epoch, split, result, seconds)

    def watched(self, progress: Progress, statistics: dict[str, LayerStatistics]) -> None:
        self._write("statistics", layers={name: asdict(layer) for name, layer in statistics.items()})
        self._then.watched(progress, statistics)

    def stop_requested(self) -> bool:
        return self._then.stop_requested()


def dataset_sha256(dataset: Dataset) -> str:
    """Return the SHA-256 of all images and labels."""
    digest = hashlib.sha256()
    for split in (dataset.train, dataset.test):
        digest.update(np.ascontiguousarray(split.images).data)
        digest.update(np.ascontiguousarray(split.labels).data)
    return digest.hexdigest()


def describe(dataset: Dataset, recipe: Recipe) -> NetworkInfo:
    """Return how a run folder describes the digit network and its input."""
    _, channels, height, width = dataset.train.images.shape
    scaling = Scaling.of(dataset.train.images, recipe.pixels)
    return NetworkInfo(
        channels=channels,
        height=height,
        width=width,
        classes=list(dataset.classes),
        pixel_mean=list(scaling.mean),
        pixel_scale=list(scaling.scale),
        batch_norm=recipe.batch_norm,
        hidden_bias=recipe.hidden_bias,
        eps=recipe.batch_norm_eps,
    )


def draw_curves(run: Run) -> None:
    """Draw ``curves.png`` and ``statistics.png`` from the run's metrics, if there are any yet.

    What goes wrong is told with a warning: no picture is worth a training.
    """
    try:
        _draw_curves(run)
    except Exception as error:
        warn(f"the curves of {run.path} could not be drawn: {error}")


def _draw_curves(run: Run) -> None:
    rows: Sequence[dict[str, Any]] = run.metrics()
    title = f"{run.info.data}, recipe {run.recipe.name}, seed {run.info.seed}"
    if any(row["kind"] == "progress" for row in rows):
        save_figure(curves(rows, title), run.path / "curves.png")
    if any(row["kind"] == "statistics" for row in rows):
        save_figure(statistics(rows, f"What batch normalization sees: {title}"), run.path / "statistics.png")


def result_of(outcome: Outcome) -> dict[str, Any]:
    """Return the figures of a finished training as plain values."""
    return {
        "epochs": outcome.progress.epoch,
        "steps": outcome.progress.step,
        "images": outcome.progress.images,
        "loss": outcome.progress.loss,
        "train_accuracy": outcome.train.accuracy,
        "test_accuracy": outcome.test.accuracy,
        "test_loss": outcome.test.loss,
        "precision": outcome.precision,
        "seconds": {name: round(value, 4) for name, value in outcome.seconds.items()},
        "images_per_second": round(outcome.progress.images / max(outcome.seconds["train"], 1e-9)),
    }
