"""The data set on the device: a batch is an index, and pixels become numbers there."""

from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data import Split
from .augment import Augmentation
from .recipe import Recipe

_MIX, _SOME = 5, 6  # purposes of random streams


@dataclass(frozen=True)
class Scaling:
    """``(pixel - mean) * scale`` per channel, in units of the uint8 pixel."""

    mean: tuple[float, ...]
    scale: tuple[float, ...]

    @classmethod
    def of(cls, images: np.ndarray, kind: str) -> "Scaling":
        """Measure the scaling of uint8 images ``(N, C, H, W)``: ``unit`` or ``standardized``."""
        channels = images.shape[1]
        if kind == "unit":
            return cls((0.0,) * channels, (1 / 255,) * channels)
        levels = np.arange(256)
        mean, scale = [], []
        for channel in range(channels):
            counts = torch.bincount(torch.from_numpy(images[:, channel].reshape(-1)), minlength=256).numpy()
            average = float((counts * levels).sum() / counts.sum())
            variance = float((counts * (levels - average) ** 2).sum() / counts.sum())
            mean.append(average)
            scale.append(1 / max(variance, 1.0) ** 0.5)
        return cls(tuple(mean), tuple(scale))

    def pixels(self, x: Tensor) -> np.ndarray:
        """The uint8 pixels of scaled images ``(N, C, H, W)``."""
        mean, scale = (
            torch.tensor(values, device=x.device).view(-1, 1, 1) for values in (self.mean, self.scale)
        )
        return (x / scale + mean).round().clamp(0, 255).to(torch.uint8).contiguous().cpu().numpy()


class DeviceImages:
    """A split of a data set held on a device as uint8; ``(N, C, H, W)``, labels int64 ``(N,)``.

    ``shift``: largest random translation in pixels; the border is filled with the darkest value. ``flip``:
    mirror half of the images at random. ``more``: what else happens to them.
    """

    def __init__(
        self,
        split: Split,
        scaling: Scaling,
        device: torch.device,
        *,
        shift: int = 0,
        flip: bool = False,
        more: Augmentation | None = None,
    ) -> None:
        images = torch.from_numpy(split.images).to(device)
        height, width = images.shape[-2:]
        if shift:
            images = torch.nn.functional.pad(images, (shift,) * 4)
        self._windows = images.unfold(2, height, 1).unfold(3, width, 1)
        self._shift, self._flip, self._more = shift, flip, more or Augmentation()
        self.labels = torch.from_numpy(split.labels).to(device)
        self._mean = torch.tensor(scaling.mean, device=device).view(-1, 1, 1)
        self._scale = torch.tensor(scaling.scale, device=device).view(-1, 1, 1)

    @classmethod
    def to_train_on(
        cls, split: Split, scaling: Scaling, device: torch.device, recipe: Recipe
    ) -> "DeviceImages":
        """The images with the augmentation of a recipe."""
        more = Augmentation(recipe.crop, recipe.rotation, recipe.color)
        return cls(split, scaling, device, shift=recipe.shift, flip=recipe.flip, more=more)

    def __len__(self) -> int:
        return len(self.labels)

    def some(self, most: int) -> "DeviceImages":
        """So many of these images, the same each time, as they were read; all of them if ``most`` is 0."""
        if not 0 < most < len(self):
            return self
        # Drawn, not every sixth: MNIST's writers alternate, and every second image is harder.
        place = torch.randperm(len(self), generator=generator_for(0, _SOME))[:most].sort().values
        place, found = place.to(self.labels.device), copy(self)
        images = self._windows[:, :, self._shift, self._shift].index_select(0, place)
        height, width = self.size
        found._windows = images.unfold(2, height, 1).unfold(3, width, 1)
        found.labels, found._shift = self.labels[place], 0
        return found

    @property
    def augmented(self) -> bool:
        """Whether a batch draws random numbers."""
        return bool(self._shift or self._flip or self._more)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the images."""
        height, width = self._windows.shape[-2:]
        return height, width

    def batch(
        self,
        index: Tensor | slice,
        generator: torch.Generator | None = None,
        part: slice | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return float32 images ``(B, C, H, W)``, channels_last, and labels ``(B,)``.

        With a generator the images are augmented; without one they are as they were read. With ``part`` only
        that part of the index is returned, augmented as it is within the whole.
        """
        if isinstance(index, slice):
            pixels = self._windows[index, :, self._shift, self._shift]
        else:
            count, part = len(index), slice(None) if part is None else part
            index = index[part]
            pixels = self._pick(index, count, generator, part)
            if self._more and generator is not None:
                numbers = self._more.draw(count, generator)[:, part].to(index.device)
                pixels = self._more.apply(pixels.float(), numbers)
        x = (pixels.float() - self._mean).mul_(self._scale)
        return x.contiguous(memory_format=torch.channels_last), self.labels[index]

    def _pick(
        self, index: Tensor, count: int, generator: torch.Generator | None, part: slice | Tensor
    ) -> Tensor:
        if generator is None or not (self._shift or self._flip):
            return self._windows[:, :, self._shift, self._shift].index_select(0, index)
        # Numbers are drawn for all of the step's ``count`` images, so each part is as in the whole.
        move = torch.randint(0, 2 * self._shift + 1, (2, count), generator=generator)[:, part]
        pixels = self._windows[index, :, *move.to(index.device)]
        if self._flip:
            mirrored = torch.rand(count, generator=generator)[part].to(index.device) < 0.5
            pixels = torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
        return pixels


class Order:
    """Which images each step sees: a permutation per epoch, a pure function of the seed and the epoch.

    So the position in a training is one number, and a resumed run sees what it would have seen.
    """

    def __init__(self, count: int, recipe: Recipe, seed: int) -> None:
        self._count, self._seed = count, seed
        self._edges = [*batch_starts(count, recipe.batch_size), count]
        self.steps_per_epoch = len(self._edges) - 1
        self.steps = max(1, round(recipe.epochs * self.steps_per_epoch))
        self._epoch, self._permutation = -1, torch.empty(0)

    def indices(self, step: int) -> Tensor:
        """Return the image numbers of a step, int64 ``(B,)`` on the CPU."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._permutation = torch.randperm(self._count, generator=generator_for(self._seed, epoch))
            self._epoch = epoch
        return self._permutation[self._edges[place] : self._edges[place + 1]]

    def images_before(self, step: int) -> int:
        """Return how many images the steps before this one have seen."""
        epochs, place = divmod(step, self.steps_per_epoch)
        return epochs * self._count + self._edges[place]


def batch_starts(count: int, batch_size: int) -> list[int]:
    """Return where each batch begins; a last batch of one image joins its neighbour."""
    starts = list(range(0, count, batch_size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return starts


def generator_for(seed: int, *purpose: int) -> torch.Generator:
    """Return a CPU generator whose stream depends on the seed and on what it is for, and on nothing else."""
    state = np.random.SeedSequence([seed, *purpose]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def mixing_share(alpha: float, seed: int, step: int) -> float:
    """Return the share of the first image of a step's pairs: drawn from Beta(α, α), at least a half.

    Mixup: Zhang et al. 2018. The larger share is the first image's, so that its label stays the image's own.
    """
    # RandomState's numbers are the same in every version of NumPy.
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, step, _MIX])))
    share = float(random.beta(alpha, alpha))
    return max(share, 1 - share)
