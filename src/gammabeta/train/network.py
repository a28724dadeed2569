"""The notebook's convolutional network, for any channels, image size and number of classes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import nn as gbnn
from ..errors import UsageError
from ..stats.preserve import preserved

SMALLEST_SIDE = 16  # two valid convolutions (3, 5) and two poolings leave one pixel


@dataclass(frozen=True)
class LayerView:
    """What one layer did to a batch. Per-channel tensors are float32 of shape ``(C,)``, variances named."""

    name: str
    shape: tuple[int, ...]
    output: Tensor | None = None
    batch_mean: Tensor | None = None
    batch_var: Tensor | None = None  # biased, over the batch and the spatial axes
    running_mean: Tensor | None = None
    running_var: Tensor | None = None  # unbiased


class DigitNetwork(nn.Sequential):
    """Two convolutions and two linear layers, batch normalization after the first three.

    A ``Sequential`` whose layers have names: what follows what can be read off its structure.

    Shapes for ``(N, C, H, W)`` input; the notebook's are those for ``(64, 1, 28, 28)``:

    ========  =====================================  ================
    ``h1``    conv 3x3 → BN → ReLU → 2x2 mean        (64, 20, 13, 13)
    ``h2``    conv 5x5 → BN → ReLU → 2x2 mean        (64, 50, 4, 4)
    ``flat``                                         (64, 800)
    ``h3``    linear → BN → ReLU                     (64, 128)
    output    linear                                 (64, classes)
    ========  =====================================  ================

    Args:
        channels: Channels of the images, ``C``.
        image_size: ``(H, W)`` in pixels, each at least 16.
        classes: Number of classes, at least 2.
        batch_norm: False leaves only activation and pooling: the twin without batch normalization.
        hidden_bias: A bias in the layers before batch normalization, as in the notebook; it cancels.
        momentum: Weight of the new value in the running statistics.
        eps: Added to the variance.
        first_batch: Start the running statistics from the first batch instead of 0 and 1.

    Raises:
        UsageError: The images are too small, or there is a class too few.
    """

    def __init__(
        self,
        channels: int = 1,
        image_size: tuple[int, int] = (28, 28),
        classes: int = 10,
        *,
        batch_norm: bool = True,
        hidden_bias: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
        first_batch: bool = False,
    ) -> None:
        super().__init__()
        if min(image_size) < SMALLEST_SIDE:
            raise UsageError(
                f"images of {image_size[0]}x{image_size[1]} are too small: 16x16 is the least; "
                "pictures in files (not arrays) are enlarged with --image-size 16x16"
            )
        if classes < 2 or channels < 1:
            raise UsageError(f"{channels} channels and {classes} classes: at least 1 and 2 are needed")
        height, width = (((side - 2) // 2 - 4) // 2 for side in image_size)
        bias = hidden_bias or not batch_norm
        options: dict[str, Any] = {"momentum": momentum, "eps": eps, "activation": "relu"}
        if first_batch:
            options["initialize"] = "first_batch"

        def norm(kind: type[nn.Module], features: int, pool: int | None) -> nn.Module:
            if not batch_norm:
                return nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)) if pool else nn.ReLU()
            return kind(features, **options, **({"pool": pool} if pool else {}))

        self.conv1 = nn.Conv2d(channels, 20, 3, bias=bias)
        self.bn1 = norm(gbnn.BatchNorm2d, 20, pool=2)
        self.conv2 = nn.Conv2d(20, 50, 5, bias=bias)
        self.bn2 = norm(gbnn.BatchNorm2d, 50, pool=2)
        self.flat = nn.Flatten()
        self.fc1 = nn.Linear(50 * height * width, 128, bias=bias)
        self.bn3 = norm(gbnn.BatchNorm1d, 128, pool=None)
        self.fc2 = nn.Linear(128, classes)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a pickle's state; version 0.1.0 flattened in its ``forward`` and had no layer for it."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "flat" not in self._modules:
            self._modules = {}
            for name, layer in state["_modules"].items():
                if name == "fc1":
                    self._modules["flat"] = nn.Flatten().train(self.training)
                self._modules[name] = layer

    def trace(self, x: Tensor) -> dict[str, tuple[int, ...]]:
        """Return the shape of every intermediate value for ``x``, in order, and change nothing."""
        shapes: dict[str, tuple[int, ...]] = {}
        renamed = {"bn1": "h1", "bn2": "h2", "bn3": "h3", "fc2": "output"}
        with preserved(self), torch.no_grad():
            self.eval()
            for name, layer in self.named_children():
                x = layer(x)
                shapes[renamed.get(name, name)] = tuple(x.shape)
        return shapes

    def inspect(self, x: Tensor) -> list[LayerView]:
        """Return what each layer does to the batch ``x``: the notebook's ``debug=True``.

        For batch-norm layers the view holds the batch's mean and biased variance and the running statistics.
        The model, its mode and its buffers are left as they were, also in training mode.
        """
        views: list[LayerView] = []
        with preserved(self), torch.no_grad():
            for name, layer in self.named_children():
                statistics = _statistics(layer, x)
                x = layer(x)
                if name != "flat":
                    views.append(LayerView(name, tuple(x.shape), x.clone(), *statistics))
        return views


def _statistics(layer: nn.Module, x: Tensor) -> tuple[Tensor | None, ...]:
    """The batch's mean and biased variance, and the running ones as they are before ``x``; else nothing."""
    if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return ()
    var, mean = torch.var_mean(x.float(), [axis for axis in range(x.dim()) if axis != 1], correction=0)
    running = (layer.running_mean, layer.running_var)
    return mean, var, *(None if value is None else value.clone() for value in running)


def initialize_like_notebook(model: nn.Module, generator: torch.Generator) -> None:
    """Draw every weight and bias from N(0, 0.01), and γ from N(1, 0.01), standard deviations meant."""
    for module in model.modules():
        mean = 1.0 if isinstance(module, nn.modules.batchnorm._BatchNorm) else 0.0
        for name, parameter in module.named_parameters(recurse=False):
            nn.init.normal_(parameter, mean if name == "weight" else 0.0, 0.01, generator=generator)


def initialize_he(model: nn.Module, generator: torch.Generator) -> None:
    """Draw weights from N(0, 2 / fan_in), He et al. 2015 equation 10; biases and β 0, γ 1."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
