"""``FrozenBatchNorm1d/2d/3d``: running statistics that nothing changes any more."""

from typing import Any, Self

import torch
from torch import Tensor

from ..epilogue import Pool
from ..errors import UsageError
from .layer import Fused


class Frozen(Fused):
    """Batch normalization with its running statistics in training too, as in fine-tuning.

    ``train()`` leaves the layer in evaluation mode. Parameters and buffers have PyTorch's names and kinds,
    ``num_batches_tracked`` included, so state dicts load in both directions. The weight and the bias do not
    train either (``requires_grad`` is False), unless ``train_affine=True``.

    Args:
        num_features: and the others as for ``BatchNorm1d/2d/3d``; ``momentum`` is only kept.
        eps: added to the variance.
        momentum: not used.
        affine: whether there are a weight and a bias.
        track_running_stats: must be True: there is nothing else to normalise with.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: whether there is a bias, if ``affine``.
        train_affine: whether the weight and the bias train.
        activation: as for ``BatchNorm1d/2d/3d``.
        pool: as for ``BatchNorm1d/2d/3d``.

    Raises:
        UsageError: ``track_running_stats=False``, or an activation or pool that does not exist.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        train_affine: bool = False,
        activation: str | None = None,
        pool: Pool = None,
    ) -> None:
        if not track_running_stats:
            raise UsageError("a frozen batch norm needs its running statistics: use track_running_stats=True")
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            activation=activation,
            pool=pool,
        )
        self.training = False
        if not train_affine:
            self.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)

    def _batch_statistics(self, running_mean: Tensor | None, running_var: Tensor | None) -> bool:
        return False


class FrozenBatchNorm1d(Frozen, torch.nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` with frozen statistics; ``Frozen`` documents it."""


class FrozenBatchNorm2d(Frozen, torch.nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` with frozen statistics; ``Frozen`` documents it."""


class FrozenBatchNorm3d(Frozen, torch.nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` with frozen statistics; ``Frozen`` documents it."""
