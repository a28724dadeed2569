"""Batch normalization on the CPU: what ``gammabeta.kernels`` promises, on the kernels of ``compiled``.

This module looks at tensors, cuts the work and calls; the arithmetic is in ``compiled``. Tensors that lie
in memory neither contiguous nor channels_last are copied into the nearer of the two first.
"""

import threading
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .compiled.arguments import pack
from .compiled.key import Key
from .layout import dense, empty, like, pooled
from .limits import unfit
from .pages import empty_like
from .plan import Plan, plan_of
from .running import update_running
from .threads import Step, run

__all__ = [
    "backward",
    "backward_apply",
    "backward_reduce",
    "forward",
    "forward_train",
    "statistics",
    "unsupported",
    "update_running",
]

_DTYPES = (torch.float32, torch.bfloat16)
_local = threading.local()


# --- what this backend takes ------------------------------------------------------------------------------


def unsupported(x: Tensor, residual: Tensor | None, activation: str | None, pool: int | None) -> str | None:
    """Why these kernels cannot take the tensors, None if they can."""
    if x.device.type != "cpu":
        return f"the tensor is on {x.device}, not on the CPU"
    return unfit(x, residual, activation, pool, _DTYPES)


def _beside(t: Tensor, x: Tensor) -> Tensor:
    """``t`` with the dtype and layout of ``x``."""
    return like(t if t.dtype == x.dtype else t.to(x.dtype), x)


def _workspace(nbytes: int) -> int:
    """The address of working memory that this Python thread keeps and reuses."""
    held: Tensor | None = getattr(_local, "held", None)
    if held is None or held.numel() < nbytes:
        held = _local.held = torch.empty(max(nbytes, 1 << 16), dtype=torch.uint8)
    return held.data_ptr()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _parameter(t: Tensor | None) -> Tensor | None:
    """A parameter as contiguous float32."""
    if t is None or (t.dtype == torch.float32 and t.is_contiguous()):
        return t
    return t.to(torch.float32).contiguous()


def _launch(
    plan: Plan,
    steps: tuple[Step, ...],
    *,
    x: int = 0,
    residual: int = 0,
    grad: int = 0,
    out: int = 0,
    dx: int = 0,
    dresidual: int = 0,
    mean: int = 0,
    var: int = 0,
    invstd: int = 0,
    weight: int = 0,
    bias: int = 0,
    dweight: int = 0,
    dbias: int = 0,
    mean_dz: int = 0,
    mean_dz_xhat: int = 0,
    eps: float = 0.0,
) -> None:
    """Run steps one after the other on the same slots."""
    parts = plan.image_parts * plan.channel_parts
    sums = _workspace(plan.sums_bytes + parts * plan.step)
    args = pack(
        *(x, residual, grad, out, dx, dresidual),
        *(mean, var, invstd, weight, bias, dweight, dbias, mean_dz, mean_dz_xhat),
        *(sums, sums + plan.sums_bytes, plan.step, *plan.sizes, 0, eps, 0.0),
    )
    run(steps, args, parts, plan.threads)


# --- forward ----------------------------------------------------------------------------------------------


@cache
def _steps(
    kernels: tuple[str, ...],
    rows: bool,
    dtype: torch.dtype,
    activation: str | None,
    residual: bool,
    pool: bool,
) -> tuple[Step, ...]:
    """The kernels by name; ``finish_…`` runs once and depends on nothing, statistics on the dtype only."""
    found = []
    for name in kernels:
        if name.startswith("finish"):
            found.append(Step(Key(name), once=True))
            continue
        key = Key(("rows_" if rows else "planes_") + name, dtype == torch.bfloat16)
        if name != "statistics":
            key = key._replace(activation=activation, residual=residual, pool=pool)
        found.append(Step(key, once=False))
    return tuple(found)


def _channelwise(x: Tensor) -> Tensor:
    return torch.empty(x.shape[1], dtype=torch.float32)


def _output(x: Tensor, pool: int | None) -> Tensor:
    return empty_like(x) if pool is None else empty(pooled(x.shape, pool), x)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, float32 of shape (C,)."""
    x = dense(x)
    plan = plan_of(x, None)
    mean, var = _channelwise(x), _channelwise(x)
    steps = _steps(("statistics", "finish_statistics"), plan.rows, x.dtype, None, False, False)
    _launch(plan, steps, x=x.data_ptr(), mean=mean.data_ptr(), var=var.data_ptr())
    return mean, var


def forward_train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    pool: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of ``x`` and the output under them: ``(out, mean, var, invstd)``; ``var`` is biased."""
    x = dense(x)
    plan = plan_of(x, pool)
    weight, bias = _parameter(weight), _parameter(bias)
    residual = None if residual is None else _beside(residual, x)
    mean, var, invstd = _channelwise(x), _channelwise(x), _channelwise(x)
    out = _output(x, pool)
    fixed = (plan.rows, x.dtype, activation, residual is not None, bool(pool))
    names = ("train",) if plan.fused_forward else ("statistics", "finish_statistics", "forward")
    _launch(
        plan,
        _steps(names, *fixed),
        x=x.data_ptr(),
        residual=_address(residual),
        out=out.data_ptr(),
        mean=mean.data_ptr(),
        var=var.data_ptr(),
        invstd=invstd.data_ptr(),
        weight=_address(weight),
        bias=_address(bias),
        eps=eps,
    )
    return out, mean, var, invstd


def forward(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    pool: int | None,
    out: Tensor | None = None,
) -> Tensor:
    """The output under the statistics given, as in evaluation; in ``out``, laid out as ``x`` is, if given."""
    x = dense(x)
    plan = plan_of(x, pool)
    weight, bias = _parameter(weight), _parameter(bias)
    residual = None if residual is None else _beside(residual, x)
    if out is None:
        out = _output(x, pool)
    _launch(
        plan,
        _steps(("forward",), plan.rows, x.dtype, activation, residual is not None, bool(pool)),
        x=x.data_ptr(),
        residual=_address(residual),
        out=out.data_ptr(),
        mean=mean.data_ptr(),
        invstd=invstd.data_ptr(),
        weight=_address(weight),
        bias=_address(bias),
    )
    return out


# --- backward ---------------------------------------------------------------------------------------------


class _Backward(NamedTuple):
    """The tensors every backward kernel reads, in the layout of the plan."""

    plan: Plan
    grad: Tensor
    x: Tensor
    mean: Tensor
    invstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    fixed: tuple[bool, torch.dtype, str | None, bool, bool]

    def linear(self, grad: Tensor) -> "_Backward":
        """The same layer without what follows the normalisation; ``grad`` is the gradient there."""
        plan, fixed = plan_of(self.x, None), (*self.fixed[:2], None, False, False)
        return self._replace(plan=plan, grad=grad, residual=None, fixed=fixed)

    def launch(self, kernels: tuple[str, ...], **addresses: int) -> None:
        _launch(
            self.plan,
            _steps(kernels, *self.fixed),
            x=self.x.data_ptr(),
            grad=self.grad.data_ptr(),
            residual=_address(self.residual),
            mean=self.mean.data_ptr(),
            invstd=self.invstd.data_ptr(),
            weight=_address(self.weight),
            bias=_address(self.bias),
            **addresses,
        )


def _prepare(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    pool: int | None,
) -> _Backward:
    x = dense(x)
    plan = plan_of(x, pool)
    residual = None if residual is None else _beside(residual, x)
    fixed = (plan.rows, x.dtype, activation, residual is not None, bool(pool))
    weight, bias = _parameter(weight), _parameter(bias)
    return _Backward(plan, _beside(grad, x), x, mean, invstd, weight, bias, residual, fixed)


def backward_reduce(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    pool: int | None,
) -> tuple[Tensor, Tensor]:
    """Per channel Σdz and Σdz·xhat: the gradients of bias and weight."""
    job = _prepare(grad, x, mean, invstd, weight, bias, residual, activation, pool)
    sum_dz, sum_dz_xhat = _channelwise(x), _channelwise(x)
    job.launch(("reduce", "finish_gradients"), dbias=sum_dz.data_ptr(), dweight=sum_dz_xhat.data_ptr())
    return sum_dz, sum_dz_xhat


def backward_apply(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    pool: int | None,
    mean_dz: Tensor,
    mean_dz_xhat: Tensor,
    need_residual: bool,
) -> tuple[Tensor, Tensor | None]:
    """``dx``, and the residual's gradient if wanted; both means are zero where the statistics were given."""
    job = _prepare(grad, x, mean, invstd, weight, bias, residual, activation, pool)
    dx = empty_like(job.x)
    dresidual = empty_like(job.x) if need_residual else None
    job.launch(
        ("apply",),
        dx=dx.data_ptr(),
        dresidual=_address(dresidual),
        mean_dz=mean_dz.data_ptr(),
        mean_dz_xhat=mean_dz_xhat.data_ptr(),
    )
    return dx, dresidual


def backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    pool: int | None,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``(dx, dweight, dbias, dresidual)``, the batch's own statistics differentiated."""
    job = _prepare(grad, x, mean, invstd, weight, bias, residual, activation, pool)
    dx, dweight, dbias = empty_like(job.x), _channelwise(x), _channelwise(x)
    dresidual = empty_like(job.x) if need_residual else None
    means = torch.empty(2, x.shape[1])
    addresses = {
        "dx": dx.data_ptr(),
        "dresidual": _address(dresidual),
        "dweight": dweight.data_ptr(),
        "dbias": dbias.data_ptr(),
        "mean_dz": means.data_ptr(),
        "mean_dz_xhat": means.data_ptr() + 4 * x.shape[1],
    }
    if job.plan.fused and (residual is None) == (dresidual is None):
        job.launch(("backward",), **addresses)
    elif dresidual is None:
        job.launch(("reduce", "finish_gradients", "apply"), **addresses)
    else:  # the first pass has written dz
        job.launch(("reduce", "finish_gradients"), **addresses)
        job.linear(dresidual).launch(("apply",), **addresses | {"dresidual": 0})
    return dx, dweight, dbias, dresidual
