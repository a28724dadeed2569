"""Small models for the cases in ``fold_cases``: each joins an operation and a batch norm in one way."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Pair(nn.Module):
    """One operation and one batch norm, joined by ``how(operation, norm, x)``."""

    def __init__(self, operation: nn.Module, norm: nn.Module, how: Callable[..., Any]) -> None:
        super().__init__()
        self.operation, self.norm, self.how = operation, norm, how

    def forward(self, x: Tensor) -> Any:
        """Join them."""
        return self.how(self.operation, self.norm, x)


class Functional(nn.Module):
    """Convolution and batch norm as function calls on the module's own tensors."""

    def __init__(self, decide: bool = False) -> None:
        super().__init__()
        self.decide = decide
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.gamma, self.beta = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8))
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("var", torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and normalise."""
        y = F.conv2d(x, self.weight)
        if self.decide and x.shape[0] > 99:  # a shape decides, and torch.fx cannot trace that
            return y
        return F.relu(F.batch_norm(y, self.mean, self.var, self.gamma, self.beta, eps=1e-3))


class NormAndActivation(nn.BatchNorm2d):
    """A batch-norm subclass with its own forward."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise, then SiLU."""
        out = F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return F.silu(out)


class Renamed(nn.BatchNorm2d):
    """A batch-norm subclass that only carries another name."""


class PaddedConv(nn.Conv2d):
    """A convolution subclass with its own forward."""

    def forward(self, input: Tensor) -> Tensor:
        """Pad by hand, then convolve."""
        return F.conv2d(F.pad(input, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class ForeignFrozen(nn.Module):
    """A frozen batch norm as other libraries write it: four buffers, a multiply and an add."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in zip(("weight", "bias", "mean", "var"), torch.rand(4, channels) + 0.5, strict=True):
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply and add."""
        scale = (self.weight * (self.var + 1e-5).rsqrt()).reshape(1, -1, 1, 1)
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.mean.reshape(1, -1, 1, 1) * scale)


class Scale(nn.Module):
    """A learned scale and shift per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(1, channels, 1, 1) + 0.5)
        self.offset = nn.Parameter(torch.randn(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply and add."""
        return x * self.gain + self.offset


class Decides(nn.Module):
    """Takes another branch on other data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        """Skip the norm when the mean is large."""
        y: Tensor = self.conv(x)
        return y if x.mean() > 9 else self.norm(y)


def seq(*modules: nn.Module) -> nn.Module:
    """Put modules in a row."""
    return nn.Sequential(*modules)


def randomised(model: nn.Module) -> nn.Module:
    """Draw running statistics and parameters, so that no batch norm is the identity."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
            if module.bias is not None:
                nn.init.normal_(module.bias)
    return model


def hooked(model: nn.Module, index: int, kind: str) -> nn.Module:
    """Hang a hook that does nothing on one module of a sequence."""
    target = model[index]
    if kind == "forward":
        target.register_forward_hook(_look)
    elif kind == "pre":
        target.register_forward_pre_hook(_look)
    else:
        target.weight.register_hook(_look)
    return model


def _look(*seen: Any) -> None:
    return None


def twice(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = norm(conv(x)) + conv(x.flip(-1))
    return out


def shared(conv: nn.Module, norms: nn.Module, x: Tensor) -> Tensor:
    y = conv(x)
    out: Tensor = norms[0](y) + norms[1](y)
    return out


def flat_tokens(linear: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    y = linear(x)
    out: Tensor = norm(y.flatten(0, 1)).reshape_as(y)
    return out


def turned_tokens(linear: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = norm(linear(x).transpose(1, 2)).transpose(1, 2)
    return out


def residual(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = norm(conv(x), x)
    return out


def joined(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = norm(torch.cat([conv(x), x], 1))
    return out


def also_returned(conv: nn.Module, norm: nn.Module, x: Tensor) -> Any:
    y = conv(x)
    return norm(y), y


def tied() -> nn.Module:
    model = seq(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
    model[2].weight = model[0].weight
    return model


def broken() -> nn.Module:
    model = randomised(seq(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    model[1].running_var[3] = float("nan")
    return model


def overflowing() -> nn.Module:
    model = seq(nn.Hardtanh(-1e-4, 1e-4), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=0.0)).half()
    nn.init.uniform_(model[1].weight, -200, 200)
    model[2].running_var.fill_(1e-6)
    return model


def no_shift(*modules: nn.Module) -> nn.Module:
    model = seq(*modules)
    for module in model:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_var.uniform_(0.5, 2.0)
    return model


def old_weight_norm(conv: nn.Module) -> nn.Module:
    """Put the hook of ``torch.nn.utils.weight_norm`` on a convolution: deprecated, and in use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        normed: nn.Module = nn.utils.weight_norm(conv)
    return normed


def scripted() -> nn.Module:
    """Compile an activation by TorchScript: deprecated, and in use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: nn.Module = torch.jit.script(nn.Hardtanh())
    return module
