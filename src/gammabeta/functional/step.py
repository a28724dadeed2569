"""One training or evaluation step on the road selected; modules and ``batch_norm`` both stand on it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.layout import Pool, dense, like
from . import eager, running, torch_path
from .checks import irregular
from .route import is_small, pools_apart, select, select_compiled


def _settle(
    x: Tensor, residual: Any, activation: str | None, pool: Pool, backend: str
) -> tuple[Any, Tensor, Any]:
    """The road (kernels, ``"compiled"`` or ``"torch"``), and the tensors in a layout it can read."""
    if torch.compiler.is_compiling():
        if select_compiled(x, residual, pool, backend) is not None:
            return "torch", x, residual
        x = dense(x)
        return "compiled", x, None if residual is None else like(residual, x)
    road, x, residual = select(x, residual, activation, pool, backend)
    return ("torch" if isinstance(road, str) else road), x, residual


def train(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    factor: float | Tensor,
    eps: float,
    activation: str | None,
    residual: Any,
    pool: Pool,
    backend: str,
    skip_nonfinite: bool,
) -> tuple[Tensor, bool | Tensor]:
    """Normalise with the batch's statistics and update the running ones, if there are any.

    Returns:
        The output, and whether the batch was counted: a bool, or a boolean tensor where reading it would
        make a device wait.
    """
    if backend == "auto" and is_small(x, True, activation, residual, pool) and not isinstance(factor, Tensor):
        call = (x, running_mean, running_var, weight, bias, factor, eps, skip_nonfinite)
        return _small(*call, activation, residual, pool)
    if pools_apart(x, pool, backend):
        given = (x, running_mean, running_var, weight, bias, factor, eps, activation, residual)
        out, accepted = train(*given, None, backend, skip_nonfinite)
        return torch_path.pooled(out, pool), accepted
    plain_factor = 1.0 if isinstance(factor, Tensor) else factor
    if irregular(x, running_mean, running_var, weight, bias, True, plain_factor, eps):
        out = torch_path.batch_norm(
            x, running_mean, running_var, weight, bias, True, plain_factor, eps, activation, residual, pool
        )
        return out, True
    road, x, residual = _settle(x, residual, activation, pool, backend)
    tail = (activation, residual, pool)
    if road == "torch":
        if running_mean is None or running_var is None:
            return torch_path.batch_norm(x, None, None, weight, bias, True, 0.0, eps, *tail), True
        return _torch(x, running_mean, running_var, weight, bias, factor, eps, skip_nonfinite, *tail)
    out, mean, var = _normalise(road, x, weight, bias, eps, *tail)
    if running_mean is None or running_var is None:
        return out, True
    count = x.numel() // x.shape[1]
    if road == "compiled":
        unbiased = var * (count / (count - 1))
        return out, running.update(running_mean, running_var, mean, unbiased, factor, skip_nonfinite)
    return out, running.update_fused(
        road, running_mean, running_var, mean, var, count, factor, skip_nonfinite
    )


def _normalise(
    road: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    residual: Any,
    pool: Pool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, mean, biased var)`` by kernels, called directly or as an operator in a graph."""
    if road == "compiled":
        found: tuple[Tensor, ...] = torch.ops.gammabeta.batch_norm_train(
            x, weight, bias, residual, eps, activation, pool
        )
        return found[0], found[1], found[2]
    return eager.train(road, x, weight, bias, residual, eps, activation, pool)


def with_statistics(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    residual: Any,
    pool: Pool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise with the batch's statistics: ``(out, mean, unbiased var)``, the last two without gradient."""
    if pools_apart(x, pool, backend):
        out, mean, var = with_statistics(x, weight, bias, eps, activation, residual, None, backend)
        return torch_path.pooled(out, pool), mean, var
    road: Any = "torch"
    if not irregular(x, None, None, weight, bias, True, 0.0, eps):
        road, x, residual = _settle(x, residual, activation, pool, backend)
    if road == "torch":
        return torch_path.train(x, weight, bias, residual, eps, activation, pool)
    out, mean, var = _normalise(road, x, weight, bias, eps, activation, residual, pool)
    count = x.numel() // x.shape[1]
    return out, mean, var * (count / (count - 1))


def _small(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    factor: float,
    eps: float,
    skip_nonfinite: bool,
    activation: str | None,
    residual: Any,
    pool: Pool,
) -> tuple[Tensor, bool | Tensor]:
    """A small input on the CPU: torch's operator, with as little around it as can be."""
    if x.numel() == x.shape[1] or eps <= 0.0:
        F.batch_norm(x, running_mean, running_var, weight, bias, True, factor, eps)  # raises
    if running_mean is None or running_var is None or not skip_nonfinite:
        out = torch.batch_norm(x, weight, bias, running_mean, running_var, True, factor, eps, False)
        return torch_path.finish_in_place(out, residual, activation, pool), True
    # With momentum 1 torch leaves the batch's own statistics, the variance unbiased already.
    mean, var = torch.zeros_like(running_mean), torch.zeros_like(running_var)
    out = torch.batch_norm(x, weight, bias, mean, var, True, 1.0, eps, False)
    accepted = running.update_small(running_mean, running_var, mean, var, factor)
    return torch_path.finish_in_place(out, residual, activation, pool), accepted


def _torch(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    factor: float | Tensor,
    eps: float,
    skip_nonfinite: bool,
    activation: str | None,
    residual: Any,
    pool: Pool,
) -> tuple[Tensor, bool | Tensor]:
    """The same through torch's operators; the running statistics are torch's own to the last bit."""
    tail = (activation, residual, pool)
    if isinstance(factor, Tensor):
        out, mean, var = torch_path.train(x, weight, bias, residual, eps, activation, pool)
        return out, running.update(running_mean, running_var, mean, var, factor, skip_nonfinite)
    if not skip_nonfinite:
        call = (x, running_mean, running_var, weight, bias, True, factor, eps)
        return torch_path.batch_norm(*call, *tail), True
    new_mean, new_var = running_mean.clone(), running_var.clone()
    out = torch_path.batch_norm(x, new_mean, new_var, weight, bias, True, factor, eps, *tail)
    with torch.no_grad():
        accepted = torch.isfinite(new_mean).all() & torch.isfinite(new_var).all()
        running_mean.copy_(torch.where(accepted, new_mean, running_mean))
        running_var.copy_(torch.where(accepted, new_var, running_var))
    return out, accepted


def evaluate(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    residual: Any,
    pool: Pool,
    backend: str,
) -> Tensor:
    """Normalise with the running statistics, which are constants."""
    if backend == "auto" and is_small(x, False, activation, residual, pool):
        if eps < 0.0:
            F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)  # raises
        out = torch.batch_norm(x, weight, bias, running_mean, running_var, False, 0.0, eps, False)
        return torch_path.finish_in_place(out, residual, activation, pool)
    if pools_apart(x, pool, backend):
        given = (x, running_mean, running_var, weight, bias, eps, activation, residual)
        return torch_path.pooled(evaluate(*given, None, backend), pool)
    wrong = irregular(x, running_mean, running_var, weight, bias, False, 0.0, eps)
    road: Any = "torch"
    if not wrong:
        road, x, residual = _settle(x, residual, activation, pool, backend)
    if running_mean is None or running_var is None or road == "torch":
        call = (x, running_mean, running_var, weight, bias, False, 0.0, eps)
        return torch_path.batch_norm(*call, activation, residual, pool)
    with torch.no_grad():
        # A copy: the running mean may be updated in place between this forward and its backward pass.
        mean = running_mean.to(torch.float32, copy=True)
        invstd = (running_var.to(torch.float32) + eps).rsqrt()
    if road == "compiled":
        operator: Any = torch.ops.gammabeta.batch_norm_apply
        applied: Tensor = operator(x, mean, invstd, weight, bias, residual, activation, pool)
        return applied
    return eager.apply(road, x, mean, invstd, weight, bias, residual, activation, pool)
