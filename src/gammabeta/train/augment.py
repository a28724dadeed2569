"""Random changes of training pictures, of a whole batch at once, in a few operations of torch."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_RATIO = math.log(4 / 3)  # a crop's proportions lie between 3:4 and 4:3 of the picture's
_DRAWN = 9  # numbers that one picture needs


@dataclass(frozen=True)
class Augmentation:
    """What happens to the pictures of a batch.

    Attributes:
        crop: the least share of a picture's area that is cut out and enlarged (Szegedy et al. 2015); 1: all.
        rotation: the largest turn either way, in degrees; what comes in from outside is a reflection.
        color: how far brightness, contrast and saturation move either way, each as a factor of ``1 ± color``;
            hues turn by up to ``color`` of a quarter circle.
    """

    crop: float = 1.0
    rotation: float = 0.0
    color: float = 0.0

    def __bool__(self) -> bool:
        return self.crop < 1 or self.rotation > 0 or self.color > 0

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the numbers ``(9, count)`` between -1 and 1 that ``apply`` takes for so many pictures."""
        return 2 * torch.rand(_DRAWN, count, generator=generator) - 1

    def apply(self, x: Tensor, numbers: Tensor) -> Tensor:
        """Change pictures ``(B, C, H, W)``, float32 from 0 to 255; ``numbers`` is ``(9, B)``."""
        if self.crop < 1 or self.rotation:
            x = self._warp(x, numbers)
        return self._tint(x, numbers[5:, :, None, None, None]) if self.color else x

    def _warp(self, x: Tensor, numbers: Tensor) -> Tensor:
        """Cut out and turn, in one interpolation."""
        height, width = x.shape[-2:]
        area = self.crop + (1 - self.crop) * (numbers[0] + 1) / 2
        ratio = (_RATIO * numbers[1]).exp() if self.crop < 1 else torch.ones_like(area)
        across, down = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        turn = math.radians(self.rotation) * numbers[4]
        cos, sin = turn.cos(), turn.sin()
        theta = torch.stack(
            (
                *(across * cos, -down * sin * (height / width), (1 - across) * numbers[2]),
                *(across * sin * (width / height), down * cos, (1 - down) * numbers[3]),
            ),
            1,
        )
        grid = F.affine_grid(theta.view(-1, 2, 3), list(x.shape), align_corners=False)
        warped: Tensor = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
        return warped

    def _tint(self, x: Tensor, numbers: Tensor) -> Tensor:
        brightness, contrast, saturation = 1 + self.color * numbers[:3]
        if x.shape[1] == 3:
            turn = self.color * math.pi / 2 * numbers[3]
            grey = x.mean(1, keepdim=True)  # the axis about which hues turn
            across = (x.roll(1, 1) - x.roll(-1, 1)) / math.sqrt(3)
            x = grey + saturation * ((x - grey) * turn.cos() + across * turn.sin())
        middle = x.mean((1, 2, 3), keepdim=True)
        tinted: Tensor = (middle * brightness + contrast * (x - middle)).clamp(0, 255)
        return tinted
