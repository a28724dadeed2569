"""A training with its run folder: begun, recorded, ended one way or another, always readable."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data import Dataset, load
from ..errors import DataError, RunError
from .batches import Scaling, batch_starts
from .checkpoint import Checkpoints
from .device import resolve_device, resolve_precision
from .fitting import Observer, Outcome, Silent, TrainingInterrupted, build_network, fit, hold_out
from .plots import curves, save_figure, statistics
from .recipe import Recipe, validate
from .record import Recorder, RunKeeper
from .run import NetworkInfo, Run
from .tensorboard import Board, check_tensorboard
from .world import ALONE, World

CHECKPOINT_SECONDS = 30.0
WATCH_POINTS = 16  # measurements of the batch-norm layers in a training


def train_run(
    dataset: Dataset,
    source: str,
    recipe: Recipe,
    path: Path,
    *,
    seed: int,
    device: str,
    holdout: int,
    observer: Observer,
    checkpoint_every: float = CHECKPOINT_SECONDS,
    tensorboard: bool = False,
    world: World = ALONE,
) -> tuple[Run, Outcome]:
    """Train the digit network on a data set into a new run folder.

    Args:
        dataset: What to train on and to judge by.
        source: The name or path that it was loaded from.
        recipe: The settings.
        path: The folder to make.
        seed: Of initialisation, order and augmentation.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        holdout: How many training images were held out to judge by.
        observer: Is told how it goes, and may ask it to stop.
        checkpoint_every: Seconds between checkpoints within an epoch.
        tensorboard: Write TensorBoard events too.
        world: The processes that train together; this one is rank 0, and the others ``follow``.

    Raises:
        UnavailableError: TensorBoard is asked for and not installed.
        RunError: The folder cannot be made or written.
        TrainingInterrupted: The observer asked to stop; the folder holds a checkpoint and the weights so far.
    """
    place = resolve_device(world.device(device))
    network = build_network(recipe, dataset, seed)
    info = {
        "seed": seed,
        "device": str(place),
        "precision": resolve_precision(recipe.precision, place),
        "data": source,
        "data_sha256": dataset_sha256(dataset),
        "holdout": holdout,
        "network": describe(dataset, recipe),
    }
    if tensorboard:
        check_tensorboard()
    run = Run.create(path, info, recipe)
    if tensorboard:
        run.board = Board(path)
    return run, _carry_out(run, network, dataset, observer, RunKeeper(run, checkpoint_every), world)


def resume_run(
    path: Path,
    dataset: Dataset,
    observer: Observer,
    *,
    tell: Callable[[str], None],
    checkpoint_every: float = CHECKPOINT_SECONDS,
    world: World = ALONE,
) -> tuple[Run, Outcome]:
    """Go on with an interrupted run: to bitwise the weights that it would have had.

    That holds on the same machine with the same number of threads.

    Args:
        path: The run folder.
        dataset: What it was trained on, with its held-out images held out again.
        observer: Is told how it goes, and may ask it to stop.
        tell: Is called with what is worth a word: where it goes on, a damaged checkpoint, other threads.
        checkpoint_every: Seconds between checkpoints within an epoch.
        world: As for ``train_run``; they need not be as many as before.

    Raises:
        RunError: It is not a run, is finished or in use.
        DataError: The data are not what they were.
    """
    run = Run.open(path)
    if run.info.data_sha256 != dataset_sha256(dataset):
        raise DataError(f"{run.info.data} is not what {path} was trained on: it has changed since")
    state, words = Checkpoints(path).load()
    network = build_network(run.recipe, dataset, run.info.seed)
    threads = run.info.provenance.get("machine", {}).get("threads")
    if threads != torch.get_num_threads():
        words.append(f"{torch.get_num_threads()} threads instead of {threads}: last bits may differ")
    run.reopen(state.values["metrics_bytes"] if state else 0)
    words.append(
        f"going on from step {state.values['step']}" if state else "no checkpoint yet: starting over"
    )
    for word in words:
        tell(word)
    keeper = RunKeeper(run, checkpoint_every, state)
    return run, _carry_out(run, network, dataset, observer, keeper, world)


class _Follower(Silent):
    def __init__(self, stop: Callable[[], bool]) -> None:
        self.stop_requested = stop  # type: ignore[method-assign]


def follow(world: World, stop: Callable[[], bool]) -> None:
    """Train along as a rank other than 0, which says what to train; write nothing.

    Args:
        world: The processes that train together.
        stop: Is asked whether all shall stop after this step.

    Raises:
        DataError: This rank has other data than rank 0.
        TrainingInterrupted: Some rank was asked to stop.
    """
    orders = world.share(None)
    if orders is None:
        return
    dataset = load(orders["data"], size=tuple(orders["size"]))
    if orders["holdout"]:
        dataset = hold_out(dataset, orders["holdout"])
    if dataset_sha256(dataset) != orders["data_sha256"]:
        raise DataError(f"{orders['data']} is not the data set that rank 0 has under this name")
    recipe = validate(orders["recipe"], "of rank 0")
    fit(
        build_network(recipe, dataset, orders["seed"]),
        dataset,
        recipe,
        device=orders["device"],
        seed=orders["seed"],
        observer=_Follower(stop),
        watch_points=WATCH_POINTS,
        world=world,
    )


def _orders(run: Run) -> dict[str, Any]:
    """What the other ranks must know to ``follow``."""
    info = run.info.model_dump(include={"seed", "data", "data_sha256", "holdout"})
    size = (run.info.network.height, run.info.network.width)
    return info | {"size": size, "recipe": run.recipe.model_dump(), "device": _kind(run.info.device)}


def _kind(device: str) -> str:
    return device.partition(":")[0]


def _carry_out(
    run: Run, network: nn.Module, dataset: Dataset, observer: Observer, keeper: RunKeeper, world: World
) -> Outcome:
    steps_per_epoch = len(batch_starts(len(dataset.train.labels), run.recipe.batch_size))
    recorder = Recorder(run, steps_per_epoch, observer)
    try:
        world.share(_orders(run))
        outcome = fit(
            network,
            dataset,
            run.recipe,
            device=run.info.device if world.size == 1 else _kind(run.info.device),
            seed=run.info.seed,
            observer=recorder,
            keeper=keeper,
            watch_points=WATCH_POINTS,
            world=world,
        )
        run.save_model(outcome.model)
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
    except BaseException:
        with suppress(RunError):  # a full disk, say: the first error is the one to tell
            run.finish("failed")
        raise
    return outcome


def dataset_sha256(dataset: Dataset) -> str:
    """Return the SHA-256 of all images and labels."""
    digest = hashlib.sha256()
    for split in (dataset.train, dataset.test):
        digest.update(np.ascontiguousarray(split.images).data)
        digest.update(np.ascontiguousarray(split.labels).data)
    return digest.hexdigest()


def describe(dataset: Dataset, recipe: Recipe) -> NetworkInfo:
    """Return what a run folder says of the digit network and its input."""
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
    """Draw ``curves.png`` and ``statistics.png`` from the run's metrics, if there are any yet."""
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
