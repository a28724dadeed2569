"""A convolution, transposed convolution or Linear with a frozen batch norm behind it, as one operation.

With s = γ / √(σ² + ε), where μ and σ² are constants, the two are one convolution with folded weights:

    z = conv(x, W s) + (b − μ) s + β,        out = relu(z + residual), or any of it left out.

Saved is ``x`` and, for the ReLU, ``out``, which the next layer saves too: not what passes between the two.
With g the gradient at z and G that of the folded weight, which the convolution's own backward pass gives:

    ∂W = G s,    ∂b = s Σg,    ∂β = Σg,    ∂γ = (⟨G, W⟩ + (b − μ) Σg) / √(σ² + ε)

The last because Σ g · conv(x, W) = ⟨G, W⟩ for each channel: the convolution's output is not needed. They are
the gradients of the unfolded parameters. Where |μ| is far greater than σ, ∂γ is a difference of large
numbers, as it is in any formula that does not centre the output first.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..epilogue import NOTHING
from ..kernels.backend import Call, Normalized
from ..kernels.cpu.allocator import empty_like
from ..kernels.tensors import affine
from .autograd import differentiate
from .step import traced


class Linear(NamedTuple):
    """A linear operation without its parameters; ``spatial`` is 0 for Linear, else the spatial dimensions."""

    spatial: int
    transposed: bool = False
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What torch's module computes."""
        if self.spatial == 0:
            product: Tensor = F.linear(x, weight, bias)
            return product
        _, transposed, stride, padding, dilation, output_padding, groups = self
        return torch.convolution(
            x, weight, bias, stride, padding, dilation, transposed, output_padding, groups
        )

    def gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of ``x``, weight and bias, for the gradient of what ``run`` gave."""
        if self.spatial == 0:
            return (
                grad @ weight if needs[0] else None,
                grad.T @ x if needs[1] else None,
                grad.sum(0) if needs[2] else None,
            )
        _, transposed, stride, padding, dilation, output_padding, groups = self
        sizes = [grad.shape[1]] if needs[2] else None
        backward: Any = torch.ops.aten.convolution_backward.default
        found: tuple[Tensor | None, Tensor | None, Tensor | None] = backward(
            grad, x, weight, sizes, stride, padding, dilation, transposed, output_padding, groups, needs
        )
        return found

    def by_channel(self, weight: Tensor) -> Tensor:
        """A weight as ``(C, …)`` with an output channel in each row: (G, rows, C/G, *k) is moved to that."""
        if not self.transposed:
            return weight
        per_group = weight.reshape(self.groups, -1, *weight.shape[1:])
        return per_group.transpose(1, 2).flatten(0, 1)

    def scaled(self, weight: Tensor, scale: Tensor) -> Tensor:
        """``weight`` with a factor (C,) for each output channel."""
        if not self.transposed:
            return weight * scale.view(-1, *[1] * (weight.dim() - 1))
        per_group = weight.reshape(self.groups, -1, *weight.shape[1:])
        factors = scale.view(self.groups, 1, -1, *[1] * self.spatial)
        return (per_group * factors).flatten(0, 1)


class Norm(NamedTuple):
    """A frozen batch norm: what is constant in it, and whether a ReLU follows."""

    mean: Tensor
    var: Tensor
    eps: float
    relu: bool


class _Tuned(torch.autograd.Function):
    """``relu(norm(linear(x)) + residual)``; see the module."""

    @staticmethod
    def forward(
        ctx: Any, plan: tuple[Linear, Norm], x: Tensor, weight: Tensor, *others: Tensor | None
    ) -> Tensor:
        linear, (mean, var, eps, relu) = plan
        bias, gamma, beta, residual = others
        invstd = (var + eps).rsqrt()
        scale = invstd if gamma is None else gamma * invstd
        shift = (-mean if bias is None else bias - mean) * scale
        out = linear.run(x, linear.scaled(weight, scale), shift if beta is None else shift + beta)
        if residual is not None:
            out += residual
        if relu:
            out.relu_()
        # The running mean may be updated in place before the backward pass.
        ctx.save_for_backward(
            x, weight, bias, gamma, beta, mean.clone(), invstd, scale, out if relu else None
        )
        ctx.linear = linear
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, gamma, beta, mean, invstd, scale, out = ctx.saved_tensors
        linear, needs = ctx.linear, ctx.needs_input_grad[1:]
        need_x, need_weight, need_bias, need_gamma, need_beta, need_residual = needs
        if out is not None:
            grad = _relu_backward(grad, out)
        added = grad if need_residual else None
        if torch.is_grad_enabled():
            call = Call(linear.run(x, weight, bias), gamma, beta, None, NOTHING, 0.0)
            z = affine(Normalized(call, mean, invstd))
            return None, *differentiate(z, (x, weight, bias, gamma, beta), needs[:5], grad), added
        wanted = need_x, need_weight or need_gamma, need_bias or need_beta or need_gamma
        dx, folded, total = linear.gradients(grad, x, linear.scaled(weight, scale), wanted)
        dweight = dbias = dgamma = None
        if need_gamma and folded is not None and total is not None:
            rows = (linear.by_channel(t).flatten(1) for t in (folded, weight))
            products = torch.linalg.vecdot(*rows)
            dgamma = (products + (-mean if bias is None else bias - mean) * total) * invstd
        if need_weight and folded is not None:
            dweight = linear.scaled(folded, scale)
        if need_bias and total is not None:
            dbias = total * scale
        return None, dx, dweight, dbias, dgamma, total if need_beta else None, added


def _relu_backward(grad: Tensor, out: Tensor) -> Tensor:
    """The gradient before a ReLU; on the CPU in memory that is used again at the next step."""
    backward: Any = torch.ops.aten.threshold_backward
    if torch.is_grad_enabled() or not grad.is_cpu:
        return backward(grad, out, 0)  # type: ignore[no-any-return]
    return backward.grad_input(grad, out, 0, grad_input=empty_like(out))  # type: ignore[no-any-return]


def serves(x: Tensor, weight: Any, norm: Norm) -> bool:
    """Whether a call is plain eager training of tensors of one dtype; all else is left to the layers."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and traced(x) is None
        and isinstance(weight, Tensor)
        and x.is_floating_point()
        and x.dtype is weight.dtype is norm.mean.dtype
        and x.dim() == weight.dim()
        and not torch.is_autocast_enabled(x.device.type)
    )


def tuned(
    linear: Linear, norm: Norm, x: Tensor, parameters: tuple[Any, Any, Any, Any], residual: Any
) -> Tensor:
    """``relu(norm(linear(x)) + residual)``; the ReLU and the residual only if there are any.

    Args:
        linear: the operation.
        norm: the frozen batch norm.
        x: ``(N, C, *spatial)``.
        parameters: weight and bias of the operation, γ and β ``(C,)``; all but the weight may be None.
        residual: of the shape of the result, or None.
    """
    differentiable: Any = _Tuned.apply
    out: Tensor = differentiable((linear, norm), x, *parameters, residual)
    return out
