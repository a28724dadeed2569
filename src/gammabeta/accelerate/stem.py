"""A network's first convolution and batch normalization as one on the CPU, for the length of a training.

What the first convolution gives is the largest tensor of many a small network, and the cheapest to compute
anew: ``kernels.conv.stem`` never stores it. The two layers stay where they are. The convolution hands its
input on in place of its output where the batch norm behind it will take both steps, and convolves where it
will not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import nn as gbnn
from ..epilogue import Epilogue, MaxPool, Pool
from ..functional.autograd import differentiate
from ..functional.step import traced, update_running
from ..graph.layers import hooked
from ..graph.trace import convolutions_before_batch_norm
from ..kernels.backend import load as kernels
from ..kernels.conv import stem
from .gradients import Convolution, replaceable

#: What a convolution gives that has left its work to its batch norm. Empty, so that nothing else can use it.
_LEFT = torch.empty(0)


class _Stem(torch.autograd.Function):
    """``pool(activation(bn(convolution(x))))`` with the batch's statistics, which leave by ``found``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        settings: tuple[Epilogue, float, torch.dtype],
        found: list[Any],
    ) -> Tensor:
        epilogue, eps, dtype = settings
        layers = stem.Stem(x, weight.contiguous(), gamma, beta, epilogue, eps)
        statistics = stem.statistics(layers)
        found.append(statistics)
        ctx.save_for_backward(x, weight, gamma, beta)
        ctx.statistics, ctx.epilogue, ctx.eps = statistics, epilogue, eps
        return stem.forward(layers, statistics, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, gamma, beta = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:4]
        if torch.is_grad_enabled():  # a second derivative is asked for: torch's operators have one
            y = F.batch_norm(F.conv2d(x, weight), None, None, gamma, beta, True, 0.0, ctx.eps)
            out = ctx.epilogue.apply(y)
            return None, *differentiate(out, (weight, gamma, beta), needs, grad.to(out.dtype)), None, None
        layers = stem.Stem(x, weight.contiguous(), gamma, beta, ctx.epilogue, ctx.eps)
        found = stem.backward(grad, layers, ctx.statistics)
        return None, *(g if need else None for g, need in zip(found, needs, strict=True)), None, None


class StemConvolution(Convolution):
    """``Conv2d`` whose output only ``behind`` reads, and may not need."""

    behind: "StemBatchNorm2d"

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(N, C, H, W)``, or leave it to the batch norm."""
        if not self.behind.takes(self, x):
            return super().forward(x)
        self.behind.left = (self, x)
        return _LEFT


class StemBatchNorm2d(gbnn.BatchNorm2d):
    """Our ``BatchNorm2d`` which also does the work of the convolution in front of it."""

    left: tuple[StemConvolution, Tensor] | None

    def takes(self, convolution: StemConvolution, x: Tensor) -> bool:
        """Tell whether this call can be done in one, as far as the convolution can see."""
        tensors = (*self._tensors(), convolution.bias)
        running = tensors[2:4]
        if not _plain(x) or hooked(self) or hooked(convolution) or not all(map(_float32, tensors)):
            return False
        if not torch.is_grad_enabled():
            return self._batch_statistics(*running) == self.training
        bias = convolution.bias
        return self.training and (bias is None or not bias.requires_grad)

    def forward(
        self,
        input: Tensor,
        residual: Any = None,
        *,
        activation: str | None = None,
        pool: Pool = None,
        mask: Tensor | None = None,
        lengths: Any = None,
    ) -> Tensor:
        """Normalise, or first convolve too."""
        given: dict[str, Any] = {"activation": activation, "pool": pool, "mask": mask, "lengths": lengths}
        if input is not _LEFT or self.left is None:
            return super().forward(input, residual, **given)
        (convolution, x), self.left = self.left, None
        activation = self.activation if activation is None else activation
        pool = self.pool if pool is None else pool
        padding: Any = convolution.padding
        size = (*x.shape[:2], x.shape[2] + 2 * padding[0], x.shape[3] + 2 * padding[1])
        if (
            residual is not None
            or mask is not None
            or lengths is not None
            or isinstance(pool, MaxPool)
            or stem.unsupported(size, convolution.weight.shape, Epilogue(activation, pool)) is not None
        ):
            convolved = Convolution.forward(convolution, x)
            return super().forward(convolved, residual, **given)
        x = (F.pad(x, (padding[1],) * 2 + (padding[0],) * 2) if any(padding) else x).contiguous()
        run = self._train if self.training else self._evaluate
        return run(convolution, x, Epilogue(activation, pool))

    def _train(self, convolution: StemConvolution, x: Tensor, epilogue: Epilogue) -> Tensor:
        found: list[Any] = []
        weight, bias, running_mean, running_var = self._tensors()
        function: Any = _Stem.apply
        settings = (epilogue, self.eps, _stored())
        out: Tensor = function(x, convolution.weight, weight, bias, settings, found)
        running, counts = self._running(running_mean, running_var)
        if counts:
            mean, var = found[0].mean, found[0].var
            if convolution.bias is not None:
                mean = mean + convolution.bias.detach()
            kernel = convolution.kernel_size
            values = len(x) * (x.shape[2] - kernel[0] + 1) * (x.shape[3] - kernel[1] + 1)
            accepted = update_running(kernels("cpu"), running, mean, var, values)
            self._count(accepted, x)
        return out

    def _evaluate(self, convolution: StemConvolution, x: Tensor, epilogue: Epilogue) -> Tensor:
        weight, bias, mean, var = self._tensors()
        assert mean is not None and var is not None  # noqa: PT018 -- `takes` has seen to it
        if convolution.bias is not None:
            mean = mean - convolution.bias
        layers = stem.Stem(x, convolution.weight.contiguous(), weight, bias, epilogue, self.eps)
        return stem.forward(layers, stem.Statistics(mean, (var + self.eps).rsqrt()), _stored())


def _stored() -> torch.dtype:
    """What the output is stored in."""
    return torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32


def _plain(x: Tensor) -> bool:
    """Whether nobody but this call sees the input: no gradient, no transformation, not in a graph."""
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is not torch.bfloat16
    return (
        x.dim() == 4
        and x.dtype is torch.float32
        and not x.requires_grad
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and traced(x) is None
        and not autocast
        and not isinstance(kernels("cpu"), str)
    )


def _float32(t: Tensor | None) -> bool:
    return t is None or (t.dtype is torch.float32 and t.is_contiguous())


@contextmanager
def one_stem(model: nn.Module) -> Iterator[None]:
    """Let pairs of convolution and batch norm that ``StemBatchNorm2d`` can stand for be that for a while."""
    pairs: list[tuple[Any, Any]] = [
        (convolution, norm)
        for convolution, norm in convolutions_before_batch_norm(model)
        if type(norm) is gbnn.BatchNorm2d and replaceable(convolution)
    ]
    for convolution, norm in pairs:
        norm.__class__, convolution.__class__ = StemBatchNorm2d, StemConvolution
        norm.__dict__["left"], convolution.__dict__["behind"] = None, norm  # past Module.__setattr__
    try:
        yield
    finally:
        for convolution, norm in pairs:
            norm.__class__, convolution.__class__ = gbnn.BatchNorm2d, nn.Conv2d
            del norm.__dict__["left"], convolution.__dict__["behind"]
