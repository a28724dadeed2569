"""``SyncBatchNorm``: batch normalization over the batches of all processes, on CPUs and GPUs."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..epilogue import NOTHING, Epilogue
from ..functional import masked, sync
from ..kernels.backend import Call
from .layer import Fused


class SyncBatchNorm(Fused):
    """Normalise with the statistics of all processes' batches together, through gloo, NCCL or the like.

    ``N`` processes give what one process gives for the whole batch: outputs, gradients and running
    statistics. Shares may be uneven or empty; the weight of a share is its number of values. The arguments
    are those of ``torch.nn.SyncBatchNorm``, and state dicts load in both directions. In evaluation, outside a
    process group and in a group of one it is ``BatchNorm``. The *biased* variance of all values normalises,
    the *unbiased* one is stored; both have the same bits on every rank.

    It is not a subclass of ``torch.nn.SyncBatchNorm``, because ``DistributedDataParallel`` refuses those on
    the CPU. As with that class, every rank of the group must call the layer, and its backward pass, equally
    often and in the same order; the gradients of weight and bias are each rank's own.

    Args:
        num_features: ``C`` of inputs ``(N, C, *spatial)``; ``N`` may be 0.
        process_group: whose ranks share their statistics; None: all.
        settings: activation, pool, skip_nonfinite and initialize; these and all others as for
            ``BatchNorm2d``. A batch that is not finite on one rank is left out on all.

    Raises:
        UsageError: an activation, pool or initialisation that does not exist.
        ValueError: in ``forward``, fewer than two dimensions, no channels, or one value per channel over all
            ranks. (The last only on the CPU: on a GPU nothing is read back, and the running statistics
            are left alone.)

    Ioffe and Szegedy 2015, Algorithm 1; Peng et al. 2018, "MegDet", section 3.3, for many devices.
    """

    process_group: Any = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        **settings: Any,
    ) -> None:
        kept = (num_features, eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(*kept, bias=bias, **settings)
        self.process_group = process_group

    def __deepcopy__(self, memo: dict[int, Any]) -> "SyncBatchNorm":
        """Copy the layer; the copy is of the same process group, which cannot be copied."""
        memo[id(self.process_group)] = self.process_group
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        restore: Any = new.__setstate__
        restore(copy.deepcopy(self.__dict__, memo))
        return new

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        if input.shape[1] == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")

    def _others(self) -> bool:
        """Whether there are other ranks to share statistics with."""
        return (
            self.training
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size(self.process_group) > 1
        )

    def _normalise(self, x: Tensor, residual: Any, epilogue: Epilogue) -> Tensor:
        if not self._others():
            return super()._normalise(x, residual, epilogue)
        kept, left = epilogue.parted(numbers=not x.is_cpu, windows=True)
        if left != NOTHING:
            return left.apply(self._normalise(x, residual, kept))
        if torch.compiler.is_compiling():  # an exchange has no place in a graph: break it here
            apart: Any = torch.compiler.disable(self._normalise)
            synced: Tensor = apart(x, residual, epilogue)
            return synced
        weight, bias, running_mean, running_var = self._tensors()
        running, counts = self._running(running_mean, running_var)
        call = Call(x, weight, bias, residual, epilogue, self.eps)
        out, accepted = sync.train(call, running, self.process_group)
        if counts:
            self._count(accepted, x)
        return out

    def _normalise_kept(self, x: Tensor, residual: Any, epilogue: Epilogue, mask: Tensor) -> Tensor:
        if not self._others():
            return super()._normalise_kept(x, residual, epilogue, mask)
        # Shares may be uneven, so what is kept is one.
        by_rows: Any = masked.by_rows
        if torch.compiler.is_compiling():
            by_rows = torch.compiler.disable(by_rows)
        out: Tensor = by_rows(x, residual, mask, lambda kept, added: self._normalise(kept, added, epilogue))
        return out
