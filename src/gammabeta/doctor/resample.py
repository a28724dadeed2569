"""Batches drawn anew from the data: what batches of their size do by chance, however the loader made them.

What is chance gets less in larger batches: as 1/n in the variance of what is computed, and in a loss.
"""

import math
import random
from statistics import median
from typing import Any

import torch

from ..stats.samples import count, join, take

BATCHES = 4


class Reservoir:
    """A uniform sample of all samples that were offered, as many as are in four batches (Vitter, 1985)."""

    def __init__(self) -> None:
        self._random = random.Random(0)
        self._kept: list[Any] = []  # batches of one sample
        self._sizes: list[int] = []
        self._offered = 0

    def offer(self, batch: Any, size: int) -> None:
        """Take some of the batch's samples; of batches that cannot be cut into samples, none."""
        self._sizes.append(size)
        for index in range(size):
            self._offered += 1
            place = len(self._kept)
            if place >= BATCHES * self._sizes[0]:
                place = self._random.randrange(self._offered)
                if place >= len(self._kept):
                    continue
            one = take(batch, torch.tensor([index]), size)
            if size > 1 and count(one) != 1:
                return
            self._kept[place : place + 1] = [one]

    def batches(self) -> list[Any]:
        """Whole batches of what was kept, of the offered ones' median size, and all of these as one.

        None where there would be fewer than two, or where samples do not fit together.
        """
        size = int(median(self._sizes)) if self._sizes else 0
        if size < 2:
            return []
        self._random.shuffle(self._kept)
        whole = self._kept[: len(self._kept) // size * size]
        if len(whole) < 2 * size:
            return []
        parts = [whole[start : start + size] for start in range(0, len(whole), size)]
        try:
            return [join(part) for part in (*parts, whole)]
        except (RuntimeError, ValueError, KeyError):  # samples of different shapes
            return []


def of_size(noise: float, together: float, batches: int) -> float:
    """The part of ``noise``, the mean over some batches, that is due to their size.

    ``together`` is that of all their samples as one batch. Noise that falls by the root of their number or
    faster is all of it; else it is taken to be a constant and a part that falls as 1/n.
    """
    if noise <= 0 or together <= noise / math.sqrt(batches):
        return max(noise, 0.0)
    return min(max((noise - together) * batches / (batches - 1), 0.0), noise)
