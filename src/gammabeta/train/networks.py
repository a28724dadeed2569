"""Which network a training has: built as a recipe says, or again as a run folder describes it."""

from typing import Any

from torch import nn

from ..data import Dataset
from ..errors import RunError
from .batches import generator_for
from .documents import NetworkInfo
from .given import TIMM, timm_network
from .network import DigitNetwork, initialize_he, initialize_like_notebook
from .recipe import Recipe
from .residual import ResidualNetwork

_INITIALIZE = 2  # a purpose of random streams


def build_network(recipe: Recipe, dataset: Dataset, seed: int) -> DigitNetwork | ResidualNetwork:
    """Build and initialise the network that a recipe names, for a data set."""
    _, channels, height, width = dataset.train.images.shape
    size, classes = (height, width), len(dataset.classes)
    first = recipe.running_statistics == "first-batch"
    network: DigitNetwork | ResidualNetwork
    if recipe.network == "residual":
        options: dict[str, Any] = {"eps": recipe.batch_norm_eps, "momentum": recipe.batch_norm_momentum}
        options |= {"initialize": "first_batch"} if first else {}
        norm = options if recipe.batch_norm else None
        network = ResidualNetwork(channels, size, classes, width=recipe.width, depth=recipe.depth, norm=norm)
    else:
        network = DigitNetwork(
            channels,
            size,
            classes,
            batch_norm=recipe.batch_norm,
            hidden_bias=recipe.hidden_bias,
            momentum=recipe.batch_norm_momentum,
            eps=recipe.batch_norm_eps,
            first_batch=first,
        )
    initialize = initialize_like_notebook if recipe.initialization == "notebook" else initialize_he
    initialize(network, generator_for(seed, _INITIALIZE))
    return network


def network_of(info: NetworkInfo, given: nn.Module | None = None) -> nn.Module:
    """Return the network that a run describes, its weights not the run's yet.

    Args:
        info: What the run says of it.
        given: The network, if it is made by code of the user's: a run folder never names code that is run.

    Raises:
        RunError: It is made by the user's code, and was not given.
        UnavailableError: It is timm's, and timm is not installed.
    """
    size, classes = (info.height, info.width), len(info.classes)
    if given is not None:
        return given
    if info.model is not None:
        if info.model.startswith(TIMM):
            return timm_network(info.model, info.channels, classes)
        raise RunError(
            f"its network is made by code, {info.model}, which a run folder may not start: name it with "
            f"--model {info.model}"
        )
    if info.kind == "residual":
        norm = {"eps": info.eps} if info.batch_norm else None
        return ResidualNetwork(
            info.channels, size, classes, width=info.base_width, depth=info.blocks, norm=norm
        )
    return DigitNetwork(
        info.channels,
        size,
        classes,
        batch_norm=info.batch_norm,
        hidden_bias=info.hidden_bias,
        eps=info.eps,
    )


def training_bytes(recipe: Recipe, dataset: Dataset, batch: int) -> tuple[int, int]:
    """Bytes that the weights take, and all of a training: gradients, momentum, the layers of a batch."""
    channels, height, width = dataset.image_shape
    classes, base = len(dataset.classes), recipe.width
    if recipe.network == "residual":
        weights = 4 * (400 * base**2 * recipe.depth + 9 * channels * base + 8 * base * classes)
        kept = base * (2 + 4 * recipe.depth)  # values a pixel, and their gradients
    else:
        rows, columns = (((side - 2) // 2 - 4) // 2 for side in (height, width))
        weights = 4 * (180 * channels + 25_000 + 50 * rows * columns * 128 + 128 * classes)
        kept = 2 * 20  # the first convolution's output and its gradient
    return weights, 3 * weights + 4 * batch * height * width * (channels + kept)
