"""A small residual network for pictures, each batch norm, addition and activation one pass."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import nn as gbnn
from ..errors import UsageError

_HALVED = 48  # pixels of the shorter side from which the first layer halves the picture
_STAGES = 3


class ResidualNetwork(nn.Sequential):
    """A convolution, three stages of residual blocks, mean and maximum over the picture, a linear layer.

    He et al. 2016, section 4.2, with fewer blocks: a stage begins with half the pixels and twice the channels
    of the one before it, and a shortcut that changes shape is a 1x1 convolution with batch normalization.
    Pictures of 48 pixels and more are halved behind the first convolution.

    Shapes for ``(N, C, H, W)`` input, here ``(64, 3, 64, 64)`` with width 32:

    ==========  ===============================================  ================
    ``stem``    conv 3x3 → BN → ReLU → 2x2 mean                  (64, 32, 32, 32)
    ``stage1``  blocks: conv 3x3 → BN → ReLU → conv 3x3 → BN,
                plus the shortcut → ReLU                         (64, 32, 32, 32)
    ``stage2``  the same                                         (64, 64, 16, 16)
    ``stage3``  the same                                         (64, 128, 8, 8)
    ``pool``    mean and greatest value over the picture         (64, 256)
    ``fc``      linear                                           (64, classes)
    ==========  ===============================================  ================

    Args:
        channels: Channels of the images, ``C``.
        image_size: ``(H, W)`` in pixels; only whether the first layer halves hangs on it.
        classes: Number of classes, at least 2.
        width: Channels of the first stage.
        depth: Residual blocks in each stage.
        norm: Settings of every batch norm (``eps``, ``momentum``…); None: the twin without any.

    Raises:
        UsageError: There is a class too few.
    """

    def __init__(
        self,
        channels: int = 3,
        image_size: tuple[int, int] = (64, 64),
        classes: int = 10,
        *,
        width: int = 32,
        depth: int = 1,
        norm: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if classes < 2 or channels < 1:
            raise UsageError(f"{channels} channels and {classes} classes: at least 1 and 2 are needed")
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=norm is None)
        self.bn = _norm(width, norm, pool=2 if min(image_size) >= _HALVED else None)
        before = width
        for number in range(_STAGES):
            after = width << number
            blocks = [
                Block(before if not place else after, after, 2 if number and not place else 1, norm)
                for place in range(depth)
            ]
            self.add_module(f"stage{number + 1}", nn.Sequential(*blocks))
            before = after
        self.pool = MeanAndMax()
        self.fc = nn.Linear(2 * before, classes)


class MeanAndMax(nn.Module):
    """``(N, C, H, W)`` to ``(N, 2C)``: the mean of each channel over the picture, then its greatest value.

    A small thing somewhere in the picture hardly moves a mean.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return means and greatest values."""
        return torch.cat((x.mean((2, 3)), x.amax((2, 3))), 1)


class Block(nn.Module):
    """``relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))``, He et al. 2016, figure 2.

    ``before`` and ``after`` are the channels of input and output, ``stride`` that of the first convolution.
    The shortcut's convolution has stride 1 on every ``stride``-th pixel, which computes the same. With stride
    2 and fewer than eight channels in channels_last, oneDNN (torch 2.13) crashes in the gradient of its
    weight on CPUs without AVX-512.
    """

    def __init__(self, before: int, after: int, stride: int, norm: dict[str, Any] | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=norm is None)
        self.bn1 = _norm(after, norm)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=norm is None)
        self.bn2 = _norm(after, norm)
        self.stride = stride
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            convolution = nn.Conv2d(before, after, 1, bias=norm is None)
            plain = nn.Identity() if norm is None else gbnn.BatchNorm2d(after, **norm)
            self.shortcut = nn.Sequential(convolution, plain)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(N, after, H / stride, W / stride)`` for ``(N, before, H, W)``."""
        seen = x if self.stride == 1 else x[:, :, :: self.stride, :: self.stride]
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), self.shortcut(seen))  # type: ignore[no-any-return]


class _Activation(nn.Module):
    """What is left of a batch norm where there is none: addition, ReLU, mean over 2x2."""

    def __init__(self, pool: int | None) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(pool) if pool else nn.Identity()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out: Tensor = self.pool(torch.relu(x if residual is None else x + residual))
        return out


def _norm(features: int, settings: dict[str, Any] | None, pool: int | None = None) -> nn.Module:
    if settings is None:
        return _Activation(pool)
    return gbnn.BatchNorm2d(features, activation="relu", pool=pool, **settings)
