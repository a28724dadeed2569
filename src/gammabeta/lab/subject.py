"""The trained network that four of the benches look at, from a run folder or trained when the lab starts."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data import Dataset, Preparation, load
from ..data.classify import Classifier
from ..errors import RunError
from ..train.batches import DeviceImages, Scaling
from ..train.fitting import Observer, fit
from ..train.load import load_dataset, load_model
from ..train.network import DigitNetwork, initialize_he
from ..train.recipe import load_recipe

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained `DigitNetwork` in evaluation mode, and images it was not trained on.

    Attributes:
        model: from ``(N, 1, H, W)`` float32, scaled, to logits ``(N, classes)``; on the CPU.
        dataset: whose images it was trained on.
        scaling: how pixels become the network's numbers.
        preparation: how a drawing becomes pixels.
        temperature: by which a prediction divides the logits.
        made: the Python that makes the same network, one or two lines that end with ``model`` defined.
        accuracy: on the test images, where it is known.
        seconds: of training, where it was trained just now.
    """

    model: DigitNetwork
    dataset: Dataset
    scaling: Scaling
    preparation: Preparation
    temperature: float
    made: str
    accuracy: float | None = None
    seconds: float | None = None

    @cached_property
    def test(self) -> DeviceImages:
        """The test images, as the network takes them."""
        return DeviceImages(self.dataset.test, self.scaling, CPU)

    @cached_property
    def by_class(self) -> list[Tensor]:
        """For each class the numbers of its test images."""
        labels = self.test.labels
        return [torch.nonzero(labels == c).flatten() for c in range(len(self.dataset.classes))]

    @cached_property
    def classifier(self) -> Classifier:
        """The network as one that answers for pictures, as `gammabeta predict` asks it."""
        return Classifier(self.dataset.classes, self.preparation, self._probabilities, self.temperature)

    def scaled(self, pixels: np.ndarray) -> Tensor:
        """Uint8 pictures ``(N, C, H, W)`` as the network takes them, float32."""
        return scaled(pixels, self.scaling)

    def _probabilities(self, pixels: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            shares: Tensor = (self.model(self.scaled(pixels)) / self.temperature).softmax(1)
        return shares.numpy()


def scaled(pixels: np.ndarray, scaling: Scaling) -> Tensor:
    """Uint8 pictures ``(N, C, H, W)`` by a scaling, float32 and channels_last."""
    mean, scale = (torch.tensor(values).view(-1, 1, 1) for values in (scaling.mean, scaling.scale))
    return ((torch.from_numpy(pixels).float() - mean) * scale).contiguous(memory_format=torch.channels_last)


def train_subject(dataset: Dataset, observer: Observer | None = None) -> Subject:
    """Train the notebook's network by the recipe ``fast``: about two seconds on two cores."""
    recipe = load_recipe("fast")
    network = DigitNetwork(hidden_bias=recipe.hidden_bias, momentum=recipe.batch_norm_momentum)
    initialize_he(network, torch.Generator().manual_seed(0))
    outcome = fit(network, dataset, recipe, device="cpu", observer=observer)
    made = 'model = gb.fit(gb.train.DigitNetwork(), "mnist").model.eval()'
    subject = _subject(outcome.model, dataset, outcome.scaling, outcome.temperature, made)
    return replace(subject, accuracy=outcome.test.accuracy, seconds=outcome.seconds["train"])


def open_subject(path: Path) -> Subject:
    """Open the network of a run folder.

    Raises:
        RunError: It is not a run folder, is damaged, or holds another network than the lab shows.
        WeightsError: Its weights are missing or do not fit.
        DataError: Its data are gone.
    """
    trained = load_model(path, "cpu")
    info = trained.run.info.network
    model = trained.model
    if not isinstance(model, DigitNetwork) or not info.batch_norm or info.channels != 1:
        raise RunError(
            f"{path}: the lab shows the network of the recipes fast, classic and best, with batch "
            "normalization and grey images; this run has another one"
        )
    made = f'trained = gb.load({str(path)!r}, "cpu")\nmodel = trained.model'
    dataset = load_dataset(trained)
    return _subject(model, dataset, trained.scaling, info.temperature, made, preparation=trained.preparation)


def load_digits() -> Dataset:
    """MNIST, which is inside the package."""
    return load("mnist")


def _subject(
    model: torch.nn.Module,
    dataset: Dataset,
    scaling: Scaling,
    temperature: float,
    made: str,
    preparation: Preparation | None = None,
) -> Subject:
    assert isinstance(model, DigitNetwork)
    if preparation is None:
        preparation = dataset.settled().preparation or Preparation(1, 28, 28)
        preparation = preparation.knowing(dataset.train.images)
    model.requires_grad_(False)
    return Subject(model.eval(), dataset, scaling, preparation, temperature, made)
