"""A training with its run folder: started, resumed or followed, recorded, and readable however it ends."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import Dataset
from ..data.classes import as_classes
from ..errors import DataError, DivergedError, RunError, UsageError
from ..guard import Noticed
from ..memory import lacking
from ..memory import size as in_words
from ..stats.preserve import preserved
from ..text import stored
from .batches import Scaling, batch_starts
from .checkpoint import Checkpointer
from .documents import InitialWeights, NetworkInfo
from .evaluate import Evaluation, LayerStatistics
from .fitting import Observer, Outcome, TrainingInterrupted, fit
from .given import given_network, take_weights
from .loop import Progress
from .networks import build_network, training_bytes
from .page import Shown, write_page
from .provenance import torchrun_job
from .recipe import Recipe
from .resume import Resumption, warm_start
from .run import Job, Run
from .source import dataset_sha256, is_same, storable_source
from .trackers import Trackers, check_trackers
from .world import ALONE, AnotherFailed, World, resolve_device, resolve_precision

# What rank 0 sends: the job, the data's checksum, the classes in the network's order, weights if not random.
_Orders = tuple[Job, str, list[str], dict[str, torch.Tensor] | None]
CHECKPOINT_SECONDS = 30.0
WATCH_POINTS = 16  # measurements of the batch-norm layers in a training


def train_run(
    dataset: Dataset,
    job: Job,
    path: Path,
    observer: Observer,
    *,
    checkpoint_every: float = CHECKPOINT_SECONDS,
    track: Sequence[str] = (),
    world: World = ALONE,
) -> tuple[Run, Outcome]:
    """Train a network on a data set, which ``job.load()`` gave, into a new run folder ``path``.

    ``checkpoint_every``: seconds between checkpoints within an epoch. This process is rank 0 of ``world``,
    and the others ``follow``. After a ``TrainingInterrupted``, because the observer asked to stop, the folder
    holds a checkpoint and the weights so far.
    """
    place = resolve_device(world.device(job.device))
    first = dataset.train.images[:1]
    if first.min() == first.max() == dataset.train.images.max() == dataset.train.images.min():
        raise DataError(f"{job.source}: every training image is the same flat colour: nothing can be learned")
    if job.model is None:
        _check_memory(dataset, job.recipe)
    network, init = _start(job, dataset, observer.tell)
    info = {
        "seed": job.seed,
        "device": str(place),
        "precision": resolve_precision(job.recipe.precision, place),
        **storable_source(job.source),
        "data_sha256": dataset_sha256(dataset),
        "holdout": job.holdout,
        "holdout_rule": job.holdout_rule,
        "skip_damaged": job.skip_damaged,
        "network": describe(dataset, job.recipe, job.model),
        "init": init,
        "loss": "cross-entropy",
    }
    track = check_trackers(track)
    run = Run.create(path, info, job.recipe)
    run.trackers = Trackers(track, path, job.recipe.model_dump() | {"seed": job.seed, "data": job.source})
    return run, _fit_and_record(run, network, dataset, observer, Checkpointer(run, checkpoint_every), world)


def _check_memory(dataset: Dataset, recipe: Recipe) -> None:
    """Refuse a network that cannot be held, before it is built."""
    batch = min(recipe.batch_size, len(dataset.train.labels))
    weights, whole = training_bytes(recipe, dataset, batch)
    if lack := lacking(whole):
        _, height, width = dataset.image_shape
        raise DataError(
            f"images of {height}×{width} make a network of {in_words(weights)}; training it takes {lack}: "
            "resize a folder's pictures with --image-size, such as 64x64, or take a smaller --batch-size"
        )


def resume_run(
    begun: Path | Resumption,
    dataset: Dataset,
    observer: Observer,
    *,
    tell: Callable[[str], None],
    moved: str | None = None,
    checkpoint_every: float = CHECKPOINT_SECONDS,
    world: World = ALONE,
) -> tuple[Run, Outcome]:
    """Continue an interrupted run: the weights become bitwise those of a run without the interruption.

    That holds on the same machine with the same number of threads. ``begun`` is the run's folder, or what
    ``Resumption.of`` gave, for another number of epochs say. ``tell`` is called with messages: the step it
    continues from, a damaged checkpoint, other threads. The number of processes may differ from before.
    ``moved``: where the data set was found, if that is no longer where the run found it.
    ``RunError`` if it is not a run, is finished, changed or in use; ``DataError`` if the data have changed.
    """
    resumed = Resumption.of(begun) if isinstance(begun, Path) else begun
    run, state = resumed.run, resumed.state
    dataset = as_classes(dataset, run.info.network.classes, str(run.path))
    if not is_same(dataset, run.info.data_sha256):
        raise DataError(
            f"{moved or run.info.data} is not what {run.path} was trained on: it has changed since, or is "
            "another data set; name the right one with --data"
        )
    if run.info.network.model is None:
        _check_memory(dataset, run.recipe)
    job, init = run.job, run.info.init
    if state is not None:
        job = replace(job, init=None)  # its weights are in the checkpoint
    if resumed.given is None:
        network, _ = _start(job, dataset, tell, None if init is None else init.sha256)
    else:
        network = resumed.given
    messages = resumed.begin(len(dataset.train.labels))
    if moved is not None:
        run.move_data(moved)
    for message in messages:
        tell(message)
    checkpointer = Checkpointer(run, checkpoint_every, state)
    return run, _fit_and_record(run, network, dataset, observer, checkpointer, world)


def _start(
    job: Job, dataset: Dataset, tell: Callable[[str], None], sha256: str | None = None
) -> tuple[nn.Module, InitialWeights | None]:
    """Build the network that a training begins with; its weights are random, or those of another run."""
    network = _network(job, dataset)
    if job.init is None:
        return network, None
    if job.model is not None:
        init, message = take_weights(network, Path(job.init), sha256)
        tell(message)
        return network, init
    init, message = warm_start(network, job.init, list(dataset.classes), sha256)
    tell(message)
    return network, init


def _network(job: Job, dataset: Dataset) -> nn.Module:
    if job.model is None:
        return build_network(job.recipe, dataset, job.seed)
    channels, classes = dataset.image_shape[0], len(dataset.classes)
    network = given_network(job.model, channels, classes, job.seed)
    example = torch.zeros(2, *dataset.image_shape)
    try:
        with preserved(network), torch.inference_mode():
            found = network.eval()(example)
    except Exception as error:
        shape = "×".join(map(str, dataset.image_shape))
        raise UsageError(
            f"{job.model} does not take images of {shape}: {type(error).__name__}: {error}"
        ) from None
    if not isinstance(found, torch.Tensor) or found.shape != (2, classes):
        shown = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise UsageError(f"{job.model} gives {shown} for 2 images: logits of shape (2, {classes}) are needed")
    return network


def follow(world: World, stop: Callable[[], bool]) -> None:
    """Train as a rank other than 0, which says what to train; write nothing.

    ``stop`` is asked after each step whether all shall stop. ``DataError`` if rank 0 has other data.
    """
    orders: _Orders | None = world.broadcast(None)
    if orders is None:
        return
    job, sha256, classes, weights = orders
    dataset = as_classes(job.load(), classes, "rank 0")
    if not is_same(dataset, sha256):
        raise DataError(f"{job.source} is not the data set that rank 0 has under this name")
    observer = Observer()
    observer.stop_requested = stop  # type: ignore[method-assign]
    network = _network(job, dataset)
    if weights is not None:
        network.load_state_dict(weights)
    try:
        _fit(job, network, dataset, observer=observer, world=world)
    except DivergedError:  # all ranks notice at the same step; rank 0 has the weights, and speaks
        raise AnotherFailed from None


def _fit(job: Job, network: nn.Module, dataset: Dataset, **options: Any) -> Outcome:
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
        has = (run.recipe, stored(run.info.data), run.info.seed, run.info.holdout)
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
    network: nn.Module,
    dataset: Dataset,
    observer: Observer,
    checkpointer: Checkpointer,
    world: World,
) -> Outcome:
    job = run.job
    if world.size > 1:  # each rank has a GPU of its own: say "cuda" and not which
        job = replace(job, device=job.device.partition(":")[0])
    try:
        weights = network.state_dict() if job.init else None
        world.broadcast((job, run.info.data_sha256, run.info.network.classes, weights))
        recorder = _Recorder(run, len(dataset.train.labels), observer)
        outcome = _fit(job, network, dataset, observer=recorder, checkpointer=checkpointer, world=world)
        run.calibrated(outcome.temperature)
        run.save_model(outcome.model)
        checkpointer.write_best()
        run.finish("finished", result_of(outcome))
        write_page(Shown(run, "test", outcome.test, dataset.test, outcome.seen))
    except TrainingInterrupted:
        run.save_model(network)
        run.finish("interrupted")
        write_page(Shown(run))
        raise
    except KeyboardInterrupt:
        run.finish("interrupted")
        raise
    except DivergedError as error:
        message = f"{error}{_saved_good(run, checkpointer, error.steps)}"
        run.finish("failed", failure=message)
        write_page(Shown(run))
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
        self.guards = then.guards
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

    def noticed(self, noticed: Noticed) -> None:
        found = asdict(noticed.finding) | {"layers": list(noticed.layers), noticed.finding.check: 1}
        self._run.record("guard", step=noticed.step, **found)
        self._then.noticed(noticed)

    def compiling(self, done: int, kernels: int) -> None:
        self._then.compiling(done, kernels)

    def stop_requested(self) -> bool:
        return self._then.stop_requested()


def describe(dataset: Dataset, recipe: Recipe, model: str | None = None) -> NetworkInfo:
    """Return how a run folder describes the network and its input."""
    _, channels, height, width = dataset.train.images.shape
    scaling = Scaling.of(dataset.train.images, recipe.pixels)
    preparation = dataset.settled().preparation
    if preparation is not None:
        preparation = preparation.knowing(dataset.train.images)
    return NetworkInfo(
        channels=channels,
        height=height,
        width=width,
        classes=list(dataset.classes),
        pixel_mean=list(scaling.mean),
        pixel_scale=list(scaling.scale),
        model=model,
        kind=recipe.network,
        base_width=recipe.width,
        blocks=recipe.depth,
        batch_norm=recipe.batch_norm,
        hidden_bias=recipe.hidden_bias,
        eps=recipe.batch_norm_eps,
        preparation=preparation,
    )


def result_of(outcome: Outcome) -> dict[str, Any]:
    """Return the figures of a finished training as plain values."""
    chosen = outcome.validation
    figures = {} if chosen is None else {"accuracy": chosen.accuracy, "loss": chosen.loss}
    return {
        **{f"validation_{name}": value for name, value in figures.items()},
        "epochs": outcome.progress.epoch,
        "passes": round(outcome.progress.epochs, 4),
        "steps": outcome.progress.step,
        "images": outcome.progress.images,
        "loss": outcome.progress.loss,
        "train_accuracy": outcome.train.accuracy,
        "train_judged": outcome.train.count,
        "test_accuracy": outcome.test.accuracy,
        "test_loss": outcome.test.loss,
        "precision": outcome.precision,
        "seconds": {name: round(value, 4) for name, value in outcome.seconds.items()},
        "images_per_second": round(outcome.progress.images / max(outcome.seconds["train"], 1e-9)),
    }
