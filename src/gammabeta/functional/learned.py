"""Batch normalization and PReLU in one pass, on a CPU: ``prelu(bn(x), slope)`` (He et al. 2015, equation 1).

The slope below zero is a parameter: one, or one for each channel. With g the gradient of the output, and sums
over what is not above zero, its gradient is ``Σ g z = weight Σ g xhat + bias Σ g``. So the backward pass sums
twice, above zero and below; weight and bias take their gradients from both.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from ..epilogue import NOTHING, Epilogue
from ..kernels.backend import Call, Normalized, Running
from ..kernels.layout import like
from ..kernels.tensors import affine
from . import step
from .autograd import differentiate, kernel_call

_PRELU, _ABOVE, _BELOW = Epilogue("prelu"), Epilogue("relu"), Epilogue("below")
_TYPES = (Tensor, Parameter)


def takes(call: Call, slope: Tensor, training: bool) -> bool:
    """Whether the CPU's kernels may take a call without a residual and epilogue, and PReLU with it."""
    x = call.x
    if type(slope) not in _TYPES or slope.dtype is not torch.float32 or not slope.is_cpu:
        return False
    regular = x.dim() > 1 and x.dtype is torch.float32 and slope.numel() in (1, x.shape[1])
    return regular and not torch.compiler.is_compiling() and not step.is_small(_joined(call), training)


def _joined(call: Call) -> Call:
    return call._replace(epilogue=_PRELU)


class _Learned(torch.autograd.Function):
    """Normalise with the batch's statistics, which leave through ``statistics``; or with those given."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: tuple[Any, float, tuple[Tensor, Tensor] | None, list[Tensor]],
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        slope: Tensor,
    ) -> Tensor:
        kernels, eps, given, statistics = plan
        call = kernel_call(Call(x, weight, bias, None, _PRELU, eps))
        if given is None:
            out, mean, var, invstd = kernels.forward_train(call, leak=_spread(slope, x))
            statistics += (mean, var)
        else:
            mean, invstd = given
            out = kernels.forward(Normalized(call, mean, invstd), leak=_spread(slope, x))
        ctx.save_for_backward(x, weight, bias, slope, mean, invstd)
        ctx.kernels, ctx.eps, ctx.training = kernels, eps, given is None
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, slope, mean, invstd = ctx.saved_tensors
        normalized = Normalized(Call(x, weight, bias, None, NOTHING, ctx.eps), mean, invstd)
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            return None, *_differentiable(grad, normalized, slope, ctx.training, needs)
        return None, *_gradients(ctx.kernels, like(grad, x), normalized, slope, ctx.training, needs)


def _spread(slope: Tensor, x: Tensor) -> Tensor:
    return slope.detach().reshape(-1).expand(x.shape[1]).contiguous()


def _gradients(
    kernels: Any,
    grad: Tensor,
    normalized: Normalized,
    slope: Tensor,
    training: bool,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Of ``x``, weight, bias and slope, by the kernels."""
    x, weight, bias = normalized.call[:3]
    call, leak = kernel_call(normalized.call), _spread(slope, x)
    one, zero = torch.ones_like(leak), torch.zeros_like(leak)
    above = kernels.backward_reduce(grad, normalized._replace(call=call._replace(epilogue=_ABOVE)))
    below = kernels.backward_reduce(grad, normalized._replace(call=call._replace(epilogue=_BELOW)))
    dbias, dweight = (high + leak * low for high, low in zip(above, below, strict=True))
    dx = None
    if needs[0]:
        count = x.numel() // x.shape[1]
        means = (dbias / count, dweight / count) if training else (zero, zero)
        joined = normalized._replace(call=_joined(call))
        dx, _ = kernels.backward_apply(grad, joined, means, False, leak=leak)
    gamma, beta = one if call.weight is None else call.weight, zero if call.bias is None else call.bias
    dslope = gamma.detach() * below[1] + beta.detach() * below[0]
    if slope.numel() == 1:
        dslope = dslope.sum(dtype=torch.float64)
    return (
        dx,
        dweight.to(weight.dtype) if weight is not None and needs[1] else None,
        dbias.to(bias.dtype) if bias is not None and needs[2] else None,
        dslope.to(slope.dtype).reshape(slope.shape) if needs[3] else None,
    )


def _differentiable(
    grad: Tensor, normalized: Normalized, slope: Tensor, training: bool, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The same gradients with a graph behind them."""
    x, weight, bias, _, _, eps = normalized.call
    z = F.batch_norm(x, None, None, weight, bias, True, 0.0, eps) if training else affine(normalized)
    return differentiate(F.prelu(z, slope), (x, weight, bias, slope), needs, grad)


# --- one step ---------------------------------------------------------------------------------------------


def train(call: Call, running: Running, slope: Tensor) -> tuple[Tensor, bool | Tensor]:
    """``step.train`` of a call that is taken (``takes``), and PReLU."""
    found = step.route(_joined(call), running, True, "auto")
    if found.kind != "kernels" or found.name != "cpu":
        out, accepted = step.train(call, running)
        return F.prelu(out, slope), accepted
    x, weight, bias, _, _, eps = found.call
    statistics: list[Tensor] = []
    differentiable: Any = _Learned.apply
    out = differentiable((found.backend, eps, None, statistics), x, weight, bias, slope)
    mean, var = statistics
    if running.mean is None or running.var is None:
        return out, True
    return out, step.update_running(found.backend, running, mean, var, x.numel() // x.shape[1])


def evaluate(call: Call, running_mean: Tensor | None, running_var: Tensor | None, slope: Tensor) -> Tensor:
    """``step.evaluate`` of a call that is taken, and PReLU."""
    found = step.route(_joined(call), Running(running_mean, running_var), False, "auto")
    if found.name != "cpu" or found.kind != "kernels" or running_mean is None or running_var is None:
        return F.prelu(step.evaluate(call, running_mean, running_var), slope)
    x, weight, bias, _, _, eps = found.call
    differentiable: Any = _Learned.apply
    out: Tensor = differentiable(
        (found.backend, eps, step.constants(running_mean, running_var, eps), []), x, weight, bias, slope
    )
    return out
