"""``evaluate``: judge a run on a split, as ``gammabeta evaluate`` does."""

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..data import Dataset, Split
from ..errors import GammabetaError, UsageError
from .batches import DeviceImages, Order
from .documents import warn
from .evaluate import Evaluation
from .fitting import SEEN
from .load import Trained, load_dataset, load_model
from .loop import first_batch
from .page import Shown
from .run import Run


class Judged(NamedTuple):
    """What a run was judged on, how it did, and in how many seconds."""

    trained: Trained
    dataset: Dataset
    images: Split
    result: Evaluation  # with probabilities
    seconds: float


def judge(
    trained: Trained, data: str | None = None, split: str = "test", *, skip_damaged: bool = False
) -> Judged:
    """Evaluate a trained network on a split of its own data, or of others."""
    dataset = load_dataset(trained, data, skip_damaged=skip_damaged)
    images = dataset.split(split)
    clock = time.perf_counter()
    result = trained.evaluate(images, keep_probabilities=True)
    return Judged(trained, dataset, images, result, time.perf_counter() - clock)


def shown(path: Path, data: str | None = None, device: str = "auto") -> Shown:
    """A run with what its page shows, as much of it as there is; what is lacking is a warning."""
    run = Run.open(path)
    if run.info.status == "running" or not run.weights().exists():
        return Shown(run)
    try:
        found = judge(load_model(path, device), data)
    except GammabetaError as error:
        warn(f"the page of {path} has no images: {error}")
        return Shown(run)
    return Shown(run, "test", found.result, found.images, first_images(found))


def first_images(judged: Judged) -> np.ndarray:
    """The images of the first step of a training, as the network saw them: uint8 ``(N, C, H, W)``."""
    recipe, scaling = judged.trained.run.recipe, judged.trained.scaling
    seed = judged.trained.run.info.seed
    cpu = torch.device("cpu")
    images = DeviceImages.to_train_on(judged.dataset.train, scaling, cpu, recipe)
    order = Order(len(images), recipe, seed)
    return scaling.pixels(first_batch(images, order, seed)[:SEEN])


def evaluate(
    run: str | Path | Trained,
    data: str | Path | None = None,
    split: str = "test",
    *,
    best: bool = False,
    device: str = "auto",
) -> Evaluation:
    """Judge a run on a split; the numbers are those of ``gammabeta evaluate``.

    Args:
        run: A run folder, or what ``gammabeta.load`` gave.
        data: The name or path of other data; None: what the run was trained on.
        split: ``test``, ``train`` or, where there is one, ``validation``.
        best: The weights of the best epoch, not the last.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.

    Raises:
        UsageError: ``run`` is neither, or there is no such split.
        RunError, WeightsError, DataError: The run or the data are missing or damaged.
    """
    if not isinstance(run, str | Path | Trained):
        raise UsageError(f"evaluate takes a run folder or what load gave, not {type(run).__name__}")
    trained = run if isinstance(run, Trained) else load_model(run, device, best=best)
    return judge(trained, None if data is None else str(data), split).result
