"""How the ranks of a distributed run pool what each of them measured, and fail together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ..errors import SurgeryError
from .moments import Moments

Measured = dict[str, tuple[Moments, int]]


@dataclass(frozen=True)
class Ranks:
    """The processes that pool their moments; one alone needs no communication."""

    world_size: int = 1

    def merge(self, found: Measured, failure: BaseException | None) -> Measured:
        """Pool ``found`` over the ranks, in their order, so that all get identical results.

        Raises:
            SurgeryError: no rank had data, or another rank failed; a rank's own ``failure`` is raised as it
                is.
        """
        merged: Measured = {}
        for other in self._exchange(found, failure):
            for name, (moments, batches) in other.items():
                pooled, total = merged.setdefault(name, (Moments.empty(moments.mean.numel()), 0))
                pooled.pool(moments)
                merged[name] = (pooled, total + batches)
        if not any(moments.count for moments, _ in merged.values()):
            raise SurgeryError("the loader gave no data that reaches a batch-normalization layer")
        return merged

    def agree(self, order: list[tuple[str, int]], failure: BaseException | None) -> list[tuple[str, int]]:
        """The order of layers as seen by the first rank that has data."""
        return next((other for other in self._exchange(order, failure) if other), [])

    def _exchange(self, mine: Any, failure: BaseException | None) -> list[Any]:
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


ALONE = Ranks()


def current() -> Ranks:
    """The ranks of the default process group, or this process alone."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_world_size())
    return ALONE
