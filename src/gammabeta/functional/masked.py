"""Batch normalization of padded batches: statistics, gradients and running values of what a mask keeps.

Two ways lead to the same numbers. The CPU's kernels read the mask (``kernels/cpu/jit/masked.py``). Everywhere
else the kept values are gathered as rows ``(M, C)``, normalised by whatever path such a call takes, and put
back.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..epilogue import NOTHING, Epilogue, Pool
from ..errors import UsageError
from ..kernels.backend import Call, Normalized, Running
from . import step
from .autograd import differentiate, kernel_call

# --- masks ------------------------------------------------------------------------------------------------


def mask_of(x: Tensor, mask: Tensor | None, lengths: Any, pool: Pool = None) -> Tensor:
    """The mask ``(N, *spatial)`` that ``mask`` or ``lengths`` say: True where there is a value.

    Raises:
        UsageError: both are given; a shape, dtype or length that does not fit ``x``; a pool.
    """
    if pool is not None:
        raise UsageError("pool= and a mask do not go together: a window may hold both values and padding")
    where = (x.shape[0], *x.shape[2:])
    if lengths is not None:
        if mask is not None:
            raise UsageError("mask= and lengths= say the same: give one of them")
        return _mask_of_lengths(x, torch.as_tensor(lengths, device=x.device))
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool or tuple(mask.shape) != where:
        given = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise UsageError(f"mask must be a bool tensor {where}, True where there is a value; got {given}")
    return mask.to(x.device)


def _mask_of_lengths(x: Tensor, lengths: Tensor) -> Tensor:
    if x.dim() != 3:
        raise UsageError(f"lengths= is for sequences (N, C, L); give mask= for an input {tuple(x.shape)}")
    if lengths.shape != x.shape[:1] or lengths.is_floating_point() or lengths.dtype is torch.bool:
        raise UsageError(
            f"lengths must be {x.shape[0]} whole numbers, one a sample; "
            f"got {lengths.dtype} {tuple(lengths.shape)}"
        )
    longest = x.shape[2]
    if lengths.is_cpu and len(lengths) and not 0 <= int(lengths.min()) <= int(lengths.max()) <= longest:
        raise UsageError(f"lengths must lie between 0 and {longest}, got {lengths.tolist()}")
    return torch.arange(longest, device=x.device) < lengths.unsqueeze(1)


# --- the kept values as rows ------------------------------------------------------------------------------


def rows_of(x: Tensor, mask: Tensor) -> Tensor:
    """What the mask keeps of ``x`` (N, C, *spatial), as ``(M, C)``, sample by sample."""
    return _select(x, mask.flatten().nonzero().squeeze(1))


def _select(x: Tensor, kept: Tensor) -> Tensor:
    return x.movedim(1, -1).reshape(-1, x.shape[1]).index_select(0, kept)


def by_rows(x: Tensor, residual: Any, mask: Tensor, normalise: Callable[[Tensor, Any], Tensor]) -> Tensor:
    """``normalise(rows, rows of the residual)`` put back where the rows were; all else is 0.

    Raises:
        UsageError: the residual has not the shape of ``x``.
    """
    kept = mask.flatten().nonzero().squeeze(1)
    if isinstance(residual, Tensor) and residual.dim():
        if residual.shape != x.shape:
            raise UsageError(
                f"with a mask the residual has the shape of the input, {tuple(x.shape)}; "
                f"got {tuple(residual.shape)}"
            )
        residual = _select(residual, kept)
    out = normalise(_select(x, kept), residual)
    channels_last = x.movedim(1, -1)
    spread = out.new_zeros(mask.numel(), x.shape[1]).index_copy(0, kept, out)
    spread = spread.view(channels_last.shape).movedim(-1, 1)
    return spread if channels_last.is_contiguous() else spread.contiguous()


# --- by kernels -------------------------------------------------------------------------------------------


class _Masked(torch.autograd.Function):
    """Normalise with the statistics of what is kept, which leave through ``statistics``."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: tuple[Any, Any, Epilogue, float, Tensor, list[Tensor]],
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        backend, kept, epilogue, eps, mask, statistics = plan
        call = Call(x, weight, bias, residual, epilogue, eps)
        out, mean, var, invstd = backend.masked_train(kernel_call(call), kept)
        statistics += (mean, var)
        ctx.save_for_backward(x, weight, bias, residual, mean, invstd, mask)
        ctx.plan = plan[:4]
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, residual, mean, invstd, mask = ctx.saved_tensors
        backend, kept, epilogue, eps = ctx.plan
        call = Call(x, weight, bias, residual, epilogue, eps)
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            return None, *_differentiable(grad, call, mask, needs)
        found = backend.masked_backward(grad, Normalized(kernel_call(call), mean, invstd), kept)
        inputs = (x, weight, bias, residual)
        return None, *(
            None if t is None or not need else g.to(t.dtype)
            for g, t, need in zip(found, inputs, needs, strict=True)
        )


def _differentiable(
    grad: Tensor, call: Call, mask: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The same gradients with a graph behind them."""

    def normalise(x: Tensor, residual: Any) -> Tensor:
        return step.train(call._replace(x=x, residual=residual), Running(None, None), "torch")[0]

    out = by_rows(call.x, call.residual, mask, normalise)
    return differentiate(out, (call.x, call.weight, call.bias, call.residual), needs, grad)


# --- one step ---------------------------------------------------------------------------------------------
# While a graph is made both break it, since how much is kept is known at a run only.


def train(
    call: Call, running: Running, mask: Tensor, backend: str = "auto"
) -> tuple[Tensor, bool | Tensor | None]:
    """``step.train`` of what the mask keeps.

    Returns:
        The output, and whether the batch was counted; None if nothing is kept.

    Raises:
        UsageError: a residual of another shape.
        ValueError: one value per channel, as torch.
    """
    if torch.compiler.is_compiling():
        apart: Any = torch.compiler.disable(train)
        return apart(call, running, mask, backend)  # type: ignore[no-any-return]
    found = step.route(call, running, True, backend)
    kept = None
    if found.kind == "kernels" and hasattr(found.backend, "kept_of"):
        kept = found.backend.kept_of(found.call.x, mask)
    if kept is None and not mask.any():
        return torch.where(mask.unsqueeze(1), call.x, 0.0), None
    if kept is None:
        accepted: list[bool | Tensor] = []

        def normalise(x: Tensor, residual: Any) -> Tensor:
            out, counted = step.train(call._replace(x=x, residual=residual), running, backend)
            accepted.append(counted)
            return out

        return by_rows(call.x, call.residual, mask, normalise), accepted[0]
    x, weight, bias, residual, epilogue, eps = found.call
    statistics: list[Tensor] = []
    differentiable: Any = _Masked.apply
    plan = (found.backend, kept, epilogue, eps, mask, statistics)
    out = differentiable(plan, x, weight, bias, residual)
    if found.left is not NOTHING:
        out = torch.where(mask.unsqueeze(1), found.left.apply(out), 0.0)
    mean, var = statistics
    if running.mean is None or running.var is None:
        return out, True
    return out, step.update_running(found.backend, running, mean, var, kept.values)


def evaluate(
    call: Call, running_mean: Tensor | None, running_var: Tensor | None, mask: Tensor, backend: str = "auto"
) -> Tensor:
    """``step.evaluate``, and 0 where the mask keeps nothing."""
    if torch.compiler.is_compiling():
        apart: Any = torch.compiler.disable(evaluate)
        return apart(call, running_mean, running_var, mask, backend)  # type: ignore[no-any-return]
    padding = ~mask.unsqueeze(1)
    if torch.is_grad_enabled():  # what is not kept may be anything, a NaN too, and has no gradient
        residual = call.residual
        if isinstance(residual, Tensor):
            residual = residual.masked_fill(padding, 0.0)
        call = call._replace(x=call.x.masked_fill(padding, 0.0), residual=residual)
    out = step.evaluate(call, running_mean, running_var, backend)
    return out.masked_fill(padding, 0.0)
