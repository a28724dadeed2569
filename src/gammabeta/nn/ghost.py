"""``GhostBatchNorm1d/2d/3d``: each part of a batch normalised by itself."""

from typing import Any

import torch
from torch import Tensor

from ..epilogue import Epilogue
from ..errors import UsageError
from ..functional import step
from ..kernels.backend import Call
from ..kernels.tensors import enter
from .layer import Fused


class Ghost(Fused):
    """Normalise ghost batches: parts of a batch, each with its own mean and *biased* variance.

    A batch of ``N`` makes ``G = max(1, N // virtual_batch_size)`` ghost batches. Sample ``i`` belongs to
    ghost batch ``i % G``. This needs no copy: ``(N, C, S)`` is seen as ``(N/G, G*C, S)`` and normalised in
    one call. If ``G`` does not divide ``N``, sizes differ by one, none is smaller than
    ``virtual_batch_size``, and it takes two calls. A smaller batch is one ghost batch.

    The running statistics take one step for a batch, towards the mean over the ghost batches of their means
    and of their *unbiased* variances (weighted by size); ``momentum`` is the weight of the *new* value. In
    evaluation mode the layer is plain batch normalization.

    Args:
        virtual_batch_size: samples in a ghost batch, at least.
        settings: activation, pool, skip_nonfinite and initialize; these and all others as for
            ``BatchNorm1d/2d/3d``.

    Raises:
        UsageError: ``virtual_batch_size`` below 1, or as ``BatchNorm1d/2d/3d``.

    Hoffer, Hubara and Soudry 2017, "Train longer, generalize better", Algorithm 1, whose running statistics
    take one step for each ghost batch instead.
    """

    virtual_batch_size: int = 32

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
        virtual_batch_size: int = 32,
        **settings: Any,
    ) -> None:
        if virtual_batch_size < 1:
            raise UsageError(f"virtual_batch_size must be at least 1, got {virtual_batch_size}")
        kept = (num_features, eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(*kept, bias=bias, **settings)
        self.virtual_batch_size = virtual_batch_size

    def extra_repr(self) -> str:
        """Add the size of a ghost batch."""
        return f"{super().extra_repr()}, virtual_batch_size={self.virtual_batch_size}"

    def _normalise(self, x: Tensor, residual: Any, epilogue: Epilogue) -> Tensor:
        groups = max(1, x.shape[0] // self.virtual_batch_size)
        _, _, running_mean, running_var = self._tensors()
        if groups == 1 or not self._batch_statistics(running_mean, running_var) or x.numel() == 0:
            return super()._normalise(x, residual, epilogue)
        size, larger = x.shape[0] // groups, x.shape[0] % groups
        if larger == 0:
            out, mean, var = self._ghosts(x, residual, groups, epilogue)
        else:
            # The first ghost batches have `size` samples, the last `larger` ones have one more.
            cut = (groups - larger) * size
            rests = (None, None) if residual is None else (residual[:cut], residual[cut:])
            out, mean, var = self._ghosts(x[:cut], rests[0], groups - larger, epilogue)
            more = self._ghosts(x[cut:], rests[1], larger, epilogue)
            out = torch.cat((out, more[0]))
            share = cut / x.shape[0]
            mean, var = mean * share + more[1] * (1 - share), var * share + more[2] * (1 - share)
        running, counts = self._running(running_mean, running_var)
        if counts:
            self._count(enter(running, mean, var), x)
        return out

    def _normalise_kept(self, x: Tensor, residual: Any, epilogue: Epilogue, mask: Tensor) -> Tensor:
        if self.training:
            raise UsageError(
                "a ghost batch norm takes no mask in training: give it the values, x.movedim(1, -1)[mask]"
            )
        return super()._normalise_kept(x, residual, epilogue, mask)

    def _ghosts(
        self, x: Tensor, residual: Any, groups: int, epilogue: Epilogue
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ghost batches of one size: ``(out, mean of their means, mean of their unbiased variances)``."""
        N, C, *spatial = x.shape

        def gathered(t: Any) -> Any:
            return t.reshape(N // groups, groups * C, *spatial) if isinstance(t, Tensor) else t

        weight, bias = (None if t is None else t.repeat(groups) for t in (self.weight, self.bias))
        call = Call(gathered(x), weight, bias, gathered(residual), epilogue, self.eps)
        out, mean, var = step.with_statistics(call)
        return out.reshape(N, C, *out.shape[2:]), mean.view(groups, C).mean(0), var.view(groups, C).mean(0)


class GhostBatchNorm1d(Ghost, torch.nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` over ghost batches; ``Ghost`` documents it."""


class GhostBatchNorm2d(Ghost, torch.nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` over ghost batches; ``Ghost`` documents it."""


class GhostBatchNorm3d(Ghost, torch.nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` over ghost batches; ``Ghost`` documents it."""
