"""Exact moments of a stream of batches: corrected two-pass sums inside a batch, Chan's formula between them.

And the same over the ranks of a distributed run, which pool what each has measured, and fail together.

Chan, Golub, LeVeque (1983), "Algorithms for Computing the Sample Variance", equations 1.5 (the corrected
two-pass algorithm) and 2.1 (pooling). Everything pooled is float64 and lives on the CPU, so memory does not
grow with the number of batches.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import SurgeryError

# Values of a part that is worked on at a time: its deviations then stay in the second-level cache.
CHUNK = 1 << 17


@dataclass
class Moments:
    """Count, mean and summed squared deviations (``m2``) per channel; all pool exactly.

    Attributes:
        count: values per channel, over every batch and position seen.
        mean: (C,) float64.
        m2: (C,) float64, the sum of squared deviations from ``mean``.
        batches: batches that had any values.
    """

    count: int
    mean: Tensor
    m2: Tensor
    batches: int = 0

    @classmethod
    def empty(cls, channels: int) -> "Moments":
        """The moments of nothing: pooling with them changes nothing."""
        zeros = torch.zeros(2, channels, dtype=torch.float64, device="cpu")
        return cls(0, zeros[0], zeros[1])

    @classmethod
    def of_rows(cls, rows: Tensor) -> "Moments":
        """The moments of (K, C) rows, each row one observation."""
        rows = rows.detach().to("cpu", torch.float64)
        if rows.shape[0] == 0:
            return cls.empty(rows.shape[1])
        mean = rows.mean(0)
        return cls(rows.shape[0], mean, (rows - mean).square().sum(0), batches=1)

    def pool(self, other: "Moments") -> None:
        """Take in ``other`` (Chan et al., equation 2.1)."""
        if other.count == 0:
            return
        total = self.count + other.count
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / total)
        self.m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / total)
        self.count = total
        self.batches += other.batches

    @property
    def variance(self) -> Tensor:
        """(C,) float64, biased: what batch normalization divides by."""
        return self.m2 / max(self.count, 1)

    @property
    def unbiased_variance(self) -> Tensor:
        """(C,) float64, unbiased: what ``running_var`` stores."""
        return self.m2 / max(self.count - 1, 1)


class BatchMoments(NamedTuple):
    """The moments of one batch, over images and positions; (N, C) float64 means of each image, on the CPU."""

    whole: Moments
    image_means: Tensor


def batch_moments(x: Tensor) -> BatchMoments:
    """Moments of ``x`` (N, C, *spatial) per channel.

    The deviations from a shift near the mean are exact, or rounded once, in the input's precision (half
    precision is widened to float32 first); they are summed over one image's positions in that precision and
    over images in float64, then corrected for the shift. So a mean of 1e4 beside a standard deviation of 1
    costs no digits of the variance.
    """
    x = x.detach()
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    images, channels = x.shape[:2]
    positions = x[0, 0].numel() if images else 0
    if images * positions == 0:
        return BatchMoments(
            Moments.empty(channels), torch.zeros(0, channels, dtype=torch.float64, device="cpu")
        )
    spatial = list(range(2, x.dim()))
    shift = x.mean([0, *spatial])
    view = shift.view(1, -1, *[1] * len(spatial))
    parts = x.split(max(1, CHUNK // x[0].numel())) if x.device.type == "cpu" else (x,)
    pairs = [_sums(part - view, spatial) for part in parts]
    sums, squares = (torch.cat(both) for both in zip(*pairs, strict=True))
    count = images * positions
    shift64 = shift.cpu().double()
    correction = sums.sum(0)
    mean = shift64 + correction / count
    m2 = squares.sum(0) - correction.square() / count
    return BatchMoments(Moments(count, mean, m2.clamp_(min=0), batches=1), shift64 + sums / positions)


def _sums(deviation: Tensor, spatial: list[int]) -> tuple[Tensor, Tensor]:
    """(N, C) float64 sums and sums of squares over each image's positions; overwrites ``deviation``."""
    if not spatial:
        deviation = deviation.cpu().double()
        return deviation, deviation.square()
    sums = deviation.sum(spatial).cpu().double()  # on the CPU, since some devices have no float64
    return sums, deviation.square_().sum(spatial).cpu().double()


# --- over ranks --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """The processes that pool their moments; one alone needs no communication."""

    world_size: int

    @classmethod
    def here(cls, merge: bool = True) -> "Ranks":
        """All ranks of the process group, if there is one and they shall ``merge``."""
        several = merge and dist.is_available() and dist.is_initialized()
        return cls(dist.get_world_size() if several else 1)

    def merge(self, found: dict[str, Moments], failure: Exception | None) -> dict[str, Moments]:
        """Pool ``found`` over the ranks, in their order, so that all get identical results.

        Raises:
            SurgeryError: another rank failed; a rank's own ``failure`` is raised as it is.
        """
        merged: dict[str, Moments] = {}
        for other in self._exchange(found, failure):
            for name, moments in other.items():
                merged.setdefault(name, Moments.empty(moments.mean.numel())).pool(moments)
        return merged

    def agree(self, calls: dict[str, int], failure: Exception | None) -> dict[str, int]:
        """The calls of layers, in their order, as seen by the first rank that has data."""
        return next((other for other in self._exchange(calls, failure) if other), {})

    def total(self, mine: int) -> int:
        """The sum over the ranks."""
        return sum(self._exchange(mine, None))

    def _exchange(self, mine: Any, failure: Exception | None) -> list[Any]:
        everyone: list[Any] = [(mine, failure is not None)]
        if self.world_size > 1:
            everyone = [None] * self.world_size
            dist.all_gather_object(everyone, (mine, failure is not None))
        if failure is not None:
            raise failure
        failed = [rank for rank, (_, bad) in enumerate(everyone) if bad]
        if failed:
            raise SurgeryError(
                f"rank {failed[0]} failed while measuring; the model is unchanged on every rank"
            )
        return [found for found, _ in everyone]
