"""torch's own path: ``F.batch_norm`` and what follows it, one operator after the other.

Serves every dtype, device, tensor subclass and transform; autograd, ``torch.func`` and ``torch.export`` see
nothing but ATen operators. Each kernel computes the same, faster.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..epilogue import ACTIVATIONS, Epilogue, pool_by_torch
from ..kernels.backend import Call, Running


def batch_norm(call: Call, running: Running, training: bool) -> Tensor:
    """Exactly ``F.batch_norm``, running statistics included, then the epilogue."""
    x, weight, bias, residual, epilogue, eps = call
    momentum: float = running.factor  # type: ignore[assignment]
    out = F.batch_norm(x, running.mean, running.var, weight, bias, training, momentum, eps)
    return epilogue.apply(out, residual)


def train(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise with the batch's own statistics and return them: ``(out, mean, unbiased var)``.

    ``F.batch_norm`` returns its statistics only as running ones: with momentum 1 those are the batch's.
    """
    x, weight, bias, residual, epilogue, eps = call
    kind = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    if weight is not None:
        kind = weight.dtype
    elif bias is not None:
        kind = bias.dtype
    mean = torch.zeros(x.shape[1], dtype=kind, device=x.device)
    var = torch.zeros(x.shape[1], dtype=kind, device=x.device)
    out = F.batch_norm(x, mean, var, weight, bias, True, 1.0, eps)
    return epilogue.apply(out, residual), mean, var


def apply_in_place(out: Tensor, call: Call) -> Tensor:
    """The epilogue in the memory of ``out``, which nothing else reads, where autograd and shapes allow it."""
    residual, (activation, pool) = call.residual, call.epilogue
    if residual is None and pool is None:
        if activation is None:
            return out
        return out.relu_() if activation == "relu" else ACTIVATIONS[activation].function(out)
    if isinstance(residual, Tensor) and residual.shape == out.shape and residual.dtype is out.dtype:
        out += residual
        residual = None
    if activation == "relu" and residual is None:
        out, activation = out.relu_(), None
    if activation is None and residual is None:
        return pool_by_torch(out, pool)
    return Epilogue(activation, pool).apply(out, residual)
