"""``BatchRenorm1d/2d/3d``: the batch's statistics, corrected towards the running ones."""

from typing import Any

import torch
from torch import Tensor

from ..epilogue import NOTHING, Epilogue
from ..errors import UsageError
from ..functional import masked, step
from ..kernels import tensors
from ..kernels.backend import Call, Running
from .layer import Fused


class Renorm(Fused):
    """Batch renormalisation: training normalises almost as evaluation does, also with very small batches.

    With the batch's mean and *biased* variance, μ_B and σ_B² = var_B + eps, and the running μ and
    σ² = var + eps of before this batch:

        r = σ_B / σ, within [1 / r_max, r_max]      d = (μ_B − μ) / σ, within [−d_max, d_max]
        x̂ = (x − μ_B) / σ_B · r + d                 y = γ x̂ + β

    r and d are constants in the gradient. Where neither is at its limit, x̂ = (x − μ) / σ, as in evaluation.
    At r_max = 1 and d_max = 0 it is batch normalization. The limits follow the paper's schedule over
    ``num_batches_tracked``: batch normalization for ``warmup`` batches, then r_max grows evenly to its value
    at ``r_steps`` batches, and d_max at ``d_steps``. So the state dict is that of PyTorch's class. In
    evaluation the layer is plain batch normalization. ``reference.batch_renorm`` has the equations.

    A forward pass that is repeated inside a backward pass (activation checkpointing) is an error: the running
    statistics, and so r and d, are others by then.

    Args:
        momentum: weight of the new value in the running statistics; the paper's 0.01.
        r_max: the last limit of r, at least 1.
        d_max: the last limit of d, at least 0.
        warmup: batches normalised as by batch normalization.
        r_steps: the batch at which r_max is reached.
        d_steps: likewise for d_max.
        settings: activation, pool, skip_nonfinite, initialize, single; these and all others as for
            ``BatchNorm1d/2d/3d``.

    Raises:
        UsageError: limits or a schedule that cannot be, ``track_running_stats=False``, or as
            ``BatchNorm1d/2d/3d``.

    Ioffe 2017, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
    Algorithm 1; the schedule is that of section 4.1.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    warmup: int = 5000
    r_steps: int = 40000
    d_steps: int = 25000

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup: int = 5000,
        r_steps: int = 40000,
        d_steps: int = 25000,
        **settings: Any,
    ) -> None:
        if not track_running_stats:
            raise UsageError(
                "batch renormalisation corrects towards the running statistics: keep track of them"
            )
        if r_max < 1 or d_max < 0 or not 0 <= warmup <= min(r_steps, d_steps):
            raise UsageError(
                f"batch renormalisation needs r_max >= 1, d_max >= 0 and 0 <= warmup <= r_steps, d_steps; "
                f"got {r_max}, {d_max}, {warmup}, {r_steps}, {d_steps}"
            )
        super().__init__(num_features, eps, momentum, affine, True, device, dtype, bias=bias, **settings)
        self.r_max, self.d_max = r_max, d_max
        self.warmup, self.r_steps, self.d_steps = warmup, r_steps, d_steps

    def extra_repr(self) -> str:
        """Add the limits and their schedule."""
        names = ("r_max", "d_max", "warmup", "r_steps", "d_steps")
        return ", ".join([super().extra_repr(), *(f"{name}={getattr(self, name)}" for name in names)])

    def limits(self) -> tuple[Tensor, Tensor]:
        """The limits of r and d for the next batch, float32 ``()``; no value is read back."""
        seen = self.num_batches_tracked
        assert seen is not None  # such a layer keeps track; this tells the type checker
        done = (seen - self.warmup).clamp(min=0).float()
        r, d = ((done / max(last - self.warmup, 1)).clamp(max=1) for last in (self.r_steps, self.d_steps))
        return 1 + (self.r_max - 1) * r, self.d_max * d

    def _corrected(self, x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """γ r and γ d + β of this batch, ``(C,)``; all but γ and β are constants."""
        with torch.no_grad():
            call = Call(x, None, None, None, NOTHING, self.eps)
            found = step.route(call, Running(None, None), True, "auto")
            kernels: Any = found.backend if found.kind == "kernels" else tensors
            batch_mean, batch_var = kernels.statistics(found.call.x)
            (r_max, d_max), deviation = self.limits(), (var + self.eps).sqrt()
            r = ((batch_var + self.eps).sqrt() / deviation).clamp(1 / r_max, r_max).to(var.dtype)
            d = ((batch_mean - mean) / deviation).clamp(-d_max, d_max).to(var.dtype)
        weight, bias = self.weight, self.bias
        scale, shift = (r, d) if weight is None else (weight * r, weight * d)
        return scale, shift if bias is None else shift + bias

    def _normalise(self, x: Tensor, residual: Any, epilogue: Epilogue) -> Tensor:
        _, _, mean, var = self._tensors()
        if not self.training or mean is None or var is None or x.numel() <= x.shape[1]:
            return super()._normalise(x, residual, epilogue)
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise UsageError(
                "a batch renormalisation was repeated inside a backward pass (activation checkpointing): its "
                "running statistics have changed; leave it out of the checkpoint, or use BatchNorm"
            )
        call = Call(x, *self._corrected(x, mean, var), residual, epilogue, self.eps)
        running, counts = self._running(mean, var)
        out, accepted = step.train(call, running)
        if counts:
            self._count(accepted, x)
        return out

    def _normalise_kept(self, x: Tensor, residual: Any, epilogue: Epilogue, mask: Tensor) -> Tensor:
        if not self.training or not mask.any():
            return super()._normalise_kept(x, residual, epilogue, mask)
        return masked.by_rows(x, residual, mask, lambda rows, added: self._normalise(rows, added, epilogue))


class BatchRenorm1d(Renorm, torch.nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` with batch renormalisation; ``Renorm`` documents it."""


class BatchRenorm2d(Renorm, torch.nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` with batch renormalisation; ``Renorm`` documents it."""


class BatchRenorm3d(Renorm, torch.nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` with batch renormalisation; ``Renorm`` documents it."""
