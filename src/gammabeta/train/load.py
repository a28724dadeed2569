"""A trained network loaded from its run folder, ready to be evaluated and to predict."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..data import Split
from ..errors import DataError, UsageError
from .batches import DeviceImages, Scaling
from .documents import NetworkInfo
from .evaluate import Evaluation, evaluate, evaluating
from .network import DigitNetwork
from .run import Run
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

    def evaluate(self, split: Split, *, keep_probabilities: bool = False) -> Evaluation:
        """Judge the network on a split, in the precision it was trained in."""
        images = DeviceImages(split, self.scaling, self.device)
        classes = len(self.run.info.network.classes)
        precision = self.run.info.precision if str(self.device) == self.run.info.device else "fp32"
        return evaluate(
            self.model, images, classes, precision=precision, keep_probabilities=keep_probabilities
        )

    def probabilities(self, pictures: np.ndarray) -> Tensor:
        """Return class probabilities float32 ``(N, classes)`` for uint8 pictures ``(N, C, H, W)``."""
        split = Split(pictures, np.zeros(len(pictures), np.int64))
        x, _ = DeviceImages(split, self.scaling, self.device).batch(slice(None))
        with evaluating(self.model):
            logits: Tensor = self.model(x)
        return logits.float().softmax(1).cpu()


def load_model(path: str | Path, device: str = "auto", *, best: bool = False) -> Trained:
    """Open a run folder and build its network with its last weights, or its best.

    Raises:
        RunError: It is not a run folder, or is damaged.
        WeightsError: The weights are missing, damaged, or do not fit.
    """
    place = resolve_device(device)
    run = Run.open(path)
    with torch.device("meta"):  # nothing is allocated before the weights are known to fit
        network = network_of(run.info.network)
    model = place_model(run.load_model(network, best=best).eval(), place)
    return Trained(run, model, place)


def network_of(info: NetworkInfo) -> DigitNetwork:
    """Return the network that a run describes, its weights not the run's yet."""
    return DigitNetwork(
        info.channels,
        (info.height, info.width),
        len(info.classes),
        batch_norm=info.batch_norm,
        hidden_bias=info.hidden_bias,
        eps=info.eps,
    )


def load_split(trained: Trained, source: str | None, split: str) -> Split:
    """Return the ``test`` or ``train`` split of a data set (default: the run's), if it fits the network."""
    if split not in ("test", "train"):
        raise UsageError(f"unknown split {split!r}: choose test or train")
    job = trained.run.job
    dataset = (job if source is None else replace(job, source=source, holdout=0)).load()
    network = trained.run.info.network
    wanted, found = (network.channels, network.height, network.width), dataset.train.images.shape[1:]
    if wanted != found:
        raise DataError(f"{dataset.name} has images of {found}, the network takes {wanted}")
    if len(dataset.classes) != len(network.classes):
        raise DataError(
            f"{dataset.name} has {len(dataset.classes)} classes, the network {len(network.classes)}"
        )
    return dataset.test if split == "test" else dataset.train
