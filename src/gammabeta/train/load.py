"""A trained network loaded from its run folder, ready to be evaluated and to predict."""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data import Dataset, Preparation, Split
from ..data.classes import as_classes
from ..data.classify import Classifier, Prediction
from ..errors import DataError, UsageError
from .batches import DeviceImages, Scaling
from .evaluate import Evaluation, evaluate, evaluating, evaluation_batch
from .networks import network_of
from .run import Run
from .source import is_same
from .world import place_model, resolve_device


@dataclass(frozen=True)
class Trained:
    """A run and its network, in evaluation mode on its device."""

    run: Run
    model: nn.Module
    device: torch.device

    @property
    def scaling(self) -> Scaling:
        """How pixels become the network's numbers."""
        network = self.run.info.network
        return Scaling(tuple(network.pixel_mean), tuple(network.pixel_scale))

    @property
    def preparation(self) -> Preparation:
        """How a picture becomes the pixels that the network takes."""
        return self.run.preparation

    @property
    def classifier(self) -> Classifier:
        """The network as one that answers for pictures."""
        network = self.run.info.network
        return Classifier(
            network.classes,
            self.preparation,
            lambda pictures: self.probabilities(pictures).numpy(),
            network.temperature,
        )

    def predict(self, pictures: Any, top: int = 1) -> "Prediction | list[Prediction]":
        """Name the class of one picture or of several: see `gammabeta.data.classify.Classifier.predict`."""
        return self.classifier.predict(pictures, top)

    def evaluate(self, split: Split, *, keep_probabilities: bool = False) -> Evaluation:
        """Judge the network on a split, in float32: as it predicts, folded and exported too.

        The loss is that of the network itself; the probabilities are those of a prediction.
        """
        images = DeviceImages(split, self.scaling, self.device)
        network = self.run.info.network
        result = evaluate(self.model, images, len(network.classes), keep_probabilities=keep_probabilities)
        if result.probabilities is None:
            return result
        kept = result.probabilities.clamp_min(1e-30).log().div(network.temperature).softmax(1)
        return replace(result, probabilities=kept)

    def probabilities(self, pictures: np.ndarray) -> Tensor:
        """Return class probabilities float32 ``(N, classes)`` for uint8 pictures ``(N, C, H, W)``.

        They are the softmax of the logits over the run's temperature.
        """
        temperature = self.run.info.network.temperature
        held = DeviceImages(Split(pictures, np.zeros(len(pictures), np.int64)), self.scaling, self.device)
        batch = evaluation_batch(*held.size)
        with evaluating(self.model):
            parts = [
                self.model(held.batch(slice(start, start + batch))[0]).float().cpu()
                for start in range(0, len(held), batch)
            ]
        return torch.cat(parts).div(temperature).softmax(1)


def load_model(
    path: str | Path, device: str = "auto", *, best: bool = False, given: nn.Module | None = None
) -> Trained:
    """Open a run folder and build its network with its last weights, or its best.

    ``given``: the network of a run whose network is made by code of the user's.

    Raises:
        RunError: It is not a run folder, or is damaged.
        WeightsError: The weights are missing, damaged, or do not fit.
    """
    place = resolve_device(device)
    run = Run.open(path)
    with torch.device("meta"):  # nothing is allocated before the weights are known to fit
        network = network_of(run.info.network, given)
    model = place_model(run.load_model(network, best=best).eval(), place)
    return Trained(run, model, place)


def load_dataset(trained: Trained, source: str | None = None, *, skip_damaged: bool = False) -> Dataset:
    """Return a data set (default: the run's own) with labels that mean the network's classes.

    Its classes are found among the network's by their names. If it is what the run was trained on, wherever
    it lies, its test images are those of the run. What should be told stands in its ``notes``.

    Raises:
        DataError: It is not there or damaged, its images are of another shape, or its classes do not match.
    """
    run, network = trained.run, trained.run.info.network
    job = run.job if source is None else replace(run.job, source=source, place=None)
    job = replace(job, skip_damaged=job.skip_damaged or skip_damaged)
    whole = replace(job, holdout=0).load()
    wanted, found = (network.channels, network.height, network.width), whole.image_shape
    if wanted != found:
        raise DataError(f"{whole.name} has images of {found}, the network takes {wanted}")
    whole = as_classes(whole, network.classes, "the network")
    if source is not None and not job.holdout:
        return whole
    with suppress(UsageError):  # fewer images than are held out: another data set
        dataset = job.held(whole)
        if run.info.data_sha256 is None or is_same(dataset, run.info.data_sha256):
            return dataset
        if source is None:
            return replace(dataset, notes=(*dataset.notes, f"{run.info.data} has changed since the training"))
    return whole
