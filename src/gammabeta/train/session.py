"""A training with its run folder: begun, recorded, ended one way or another, always readable."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..data import Dataset
from .batches import Scaling
from .device import resolve_device, resolve_precision
from .evaluate import Evaluation
from .fitting import Observer, Outcome, TrainingInterrupted, build_network, fit
from .loop import Progress
from .pictures import curves, save_figure
from .recipe import Recipe
from .run import NetworkInfo, Run


class Recorder:
    """An observer that writes ``metrics.jsonl`` and passes everything on."""

    def __init__(self, run: Run, steps_per_epoch: int, then: Observer) -> None:
        self._run, self._steps_per_epoch, self._then = run, steps_per_epoch, then
        self._epochs = 0.0

    def progressed(self, progress: Progress, seconds: float) -> None:
        """Write where the training stands."""
        self._epochs = progress.step / self._steps_per_epoch
        self._run.record(
            "progress",
            step=progress.step,
            epochs=round(self._epochs, 4),
            images=progress.images,
            loss=progress.loss,
            accuracy=progress.accuracy,
            learning_rate=progress.learning_rate,
            seconds=round(seconds, 3),
        )
        self._then.progressed(progress, seconds)

    def evaluated(self, epoch: int, split: str, result: Evaluation, seconds: float) -> None:
        """Write how a split was judged."""
        self._run.record(
            "evaluation",
            epoch=epoch,
            epochs=round(self._epochs, 4),
            split=split,
            accuracy=result.accuracy,
            loss=result.loss,
            correct=result.correct,
            count=result.count,
            seconds=round(seconds, 3),
        )
        self._then.evaluated(epoch, split, result, seconds)

    def stop_requested(self) -> bool:
        """Ask whoever is told."""
        return self._then.stop_requested()


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
) -> tuple[Run, Outcome]:
    """Train the digit network on a data set into a new run folder.

    Raises:
        RunError: The folder cannot be made or written.
        TrainingInterrupted: The observer asked to stop; the folder holds the weights so far and says so.
    """
    place = resolve_device(device)
    precision = resolve_precision(recipe.precision, place)
    network = build_network(recipe, dataset, seed)
    info = {
        "seed": seed,
        "device": str(place),
        "precision": precision,
        "data": source,
        "holdout": holdout,
        "network": describe(network, dataset, recipe),
    }
    run = Run.create(path, info, recipe)
    steps_per_epoch = -(-len(dataset.train.labels) // recipe.batch_size)
    try:
        outcome = fit(
            network,
            dataset,
            recipe,
            device=device,
            seed=seed,
            observer=Recorder(run, steps_per_epoch, observer),
        )
        run.save_model(outcome.model)
        draw_curves(run)
        run.finish("finished", result_of(outcome))
    except (TrainingInterrupted, KeyboardInterrupt):
        run.save_model(network)
        draw_curves(run)
        run.finish("interrupted")
        raise
    except BaseException:
        run.finish("failed")
        raise
    return run, outcome


def describe(network: nn.Module, dataset: Dataset, recipe: Recipe) -> NetworkInfo:
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
    """Draw ``curves.png`` from the run's metrics, if there are any yet."""
    rows: Sequence[dict[str, Any]] = run.metrics()
    if any(row["kind"] == "progress" for row in rows):
        title = f"{run.info.data}, recipe {run.recipe.name}, seed {run.info.seed}"
        save_figure(curves(rows, title), run.path / "curves.png")


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
