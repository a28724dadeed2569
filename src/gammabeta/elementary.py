"""What stands around batch normalization in the network, from the equations: activations, pooling, loss, SGD.

Plain tensor operations on any device and dtype, differentiable as often as wanted.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .errors import UsageError


def relu(z: Tensor) -> Tensor:
    """Return ``max(z, 0)``. The gradient at 0 is 0, and NaN stays NaN, as in torch."""
    return torch.where(z <= 0, torch.zeros_like(z), z)


def relu6(z: Tensor) -> Tensor:
    """Return ``min(max(z, 0), 6)``; the gradient at both corners is 0."""
    return torch.where(z >= 6, torch.full_like(z, 6), relu(z))


def leaky_relu(z: Tensor, slope: float = 0.01) -> Tensor:
    """Return ``z`` where it is positive and ``slope * z`` elsewhere."""
    return torch.where(z > 0, z, slope * z)


def silu(z: Tensor) -> Tensor:
    """Return ``z * sigmoid(z)``."""
    return z * torch.sigmoid(z)


def hardswish(z: Tensor) -> Tensor:
    """Return ``z * relu6(z + 3) / 6``."""
    return z * relu6(z + 3) / 6


def gelu(z: Tensor) -> Tensor:
    """Return ``z * Φ(z)``, with Φ the normal distribution function (no tanh approximation)."""
    return z * (1 + torch.erf(z / math.sqrt(2))) / 2


def mish(z: Tensor) -> Tensor:
    """Return ``z * tanh(log(1 + exp(z)))``."""
    return z * torch.tanh(torch.logaddexp(z, torch.zeros_like(z)))


def tanh(z: Tensor) -> Tensor:
    """Return the hyperbolic tangent, ``2 * sigmoid(2z) - 1``."""
    return torch.tanh(z)


def sigmoid(z: Tensor) -> Tensor:
    """Return ``1 / (1 + exp(-z))``."""
    return torch.sigmoid(z)


def hardsigmoid(z: Tensor) -> Tensor:
    """Return ``relu6(z + 3) / 6``; the gradient at both corners is 0."""
    return relu6(z + 3) / 6


def gelu_tanh(z: Tensor) -> Tensor:
    """Return ``gelu`` with ``Φ`` approximated by a tanh."""
    return z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2


def elu(z: Tensor, alpha: float = 1.0) -> Tensor:
    """Return ``z`` where it is positive and ``alpha * (exp(z) - 1)`` elsewhere."""
    return torch.where(z > 0, z, alpha * torch.expm1(torch.where(z > 0, 0, z)))


def hardtanh(z: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Return ``min(max(z, low), high)``; the gradient at both corners is 0."""
    return torch.where(z <= low, torch.full_like(z, low), torch.where(z >= high, torch.full_like(z, high), z))


#: By name; what takes numbers besides z takes them by position.
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": relu,
    "relu6": relu6,
    "leaky_relu": leaky_relu,
    "silu": silu,
    "hardswish": hardswish,
    "gelu": gelu,
    "mish": mish,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "hardsigmoid": hardsigmoid,
    "gelu_tanh": gelu_tanh,
    "elu": elu,
    "hardtanh": hardtanh,
}


def mean_pool_2x2(x: Tensor) -> Tensor:
    """Return the means of the 2x2 blocks of ``x`` (N, C, H, W): (N, C, H // 2, W // 2).

    An odd last row or column is left out, as in ``torch.nn.functional.avg_pool2d(x, 2)``.

    Raises:
        UsageError: ``x`` is not four-dimensional, or smaller than one block.
    """
    if x.dim() != 4 or min(x.shape[2:]) < 2:
        raise UsageError(f"2x2 pooling needs (N, C, H, W) with H and W at least 2, got {tuple(x.shape)}")
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    rows = x[:, :, 0:height:2] + x[:, :, 1:height:2]
    return (rows[..., 0:width:2] + rows[..., 1:width:2]) / 4


def log_softmax(logits: Tensor) -> Tensor:
    """Return ``logits - log Σ exp(logits)`` for each row of ``(N, K)``.

    Every row is first shifted by its own maximum. That changes nothing on paper; in the machine, the largest
    exponential is then 1, so that none overflows and at least one does not vanish. One maximum for the whole
    batch would not do: a row that lies 100 below it would become 0 / 0 in float32.
    """
    shifted = logits - logits.detach().amax(dim=1, keepdim=True)
    return shifted - shifted.exp().sum(dim=1, keepdim=True).log()


def softmax(logits: Tensor) -> Tensor:
    """Return the probabilities ``exp(logits) / Σ exp(logits)`` for each row of ``(N, K)``."""
    return log_softmax(logits).exp()


def softmax_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each sample's loss ``-log softmax(logits)[label]``, shape ``(N,)``, in nats.

    Args:
        logits: ``(N, K)``.
        labels: Class indices, integers of shape ``(N,)``.
    """
    return -log_softmax(logits).gather(1, labels[:, None].long())[:, 0]


def sgd_step(parameters: Iterable[Tensor], gradients: Iterable[Tensor], learning_rate: float) -> None:
    """Move every parameter, in place, against its gradient: ``p ← p - learning_rate * g``."""
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= learning_rate * gradient


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of rows of ``logits`` (N, K) whose largest entry is at the label, from 0 to 1."""
    return (logits.argmax(dim=1) == labels).double().mean().item()
