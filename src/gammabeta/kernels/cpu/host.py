"""Batch normalization on the CPU: what ``gammabeta.kernels`` promises, on the kernels of ``jit``.

This module looks at tensors, cuts the work and calls; the arithmetic is in ``jit``. Tensors that lie
in memory neither contiguous nor channels_last are copied into the nearer of the two first.
"""

import ctypes
import math
import threading
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import MaxPool, Pool, dense, empty, like, pooled
from ..limits import unfit
from .allocator import empty_like
from .arguments import Arguments, RunningArguments, packer
from .launch import Step, call, run
from .plan import Plan, plan_of
from .registry import Key

_DTYPES = (torch.float32, torch.bfloat16)
_NOTHING: tuple[Tensor, int, int] = (torch.empty(0), 0, 0)
_local = threading.local()

_UPDATE = Key("update_running")
_pack, _pack_running = packer(Arguments), packer(RunningArguments)


# --- what this backend takes ------------------------------------------------------------------------------


def unsupported(x: Tensor, residual: Tensor | None, activation: str | None, pool: Pool) -> str | None:
    """Why these kernels cannot take the tensors, None if they can."""
    if x.device.type != "cpu":
        return f"the tensor is on {x.device}, not on the CPU"
    return unfit(x, residual, activation, pool, _DTYPES, windows=True)


class _Program(NamedTuple):
    """How tensors of one shape, layout and dtype are worked on, and the kernels for one layer's settings."""

    plan: Plan
    statistics: tuple[Step, ...]
    train: tuple[Step, ...]
    forward: tuple[Step, ...]
    reduce: tuple[Step, ...]
    apply: tuple[Step, ...]
    backward: tuple[Step, ...]  # where one part sees the whole of a channel


def _program_of(
    x: Tensor, residual: Tensor | None, activation: str | None, pool: Pool
) -> tuple[Tensor, _Program]:
    """``x`` in a layout that a kernel reads, and its program."""
    contiguous = x.is_contiguous()
    if not contiguous:
        x = dense(x)
        contiguous = x.is_contiguous()
    options = (activation, residual is not None, pool)
    return x, _program(x.shape, x.dtype, contiguous, *options, torch.get_num_threads())


@lru_cache(1024)
def _program(
    shape: torch.Size,
    dtype: torch.dtype,
    contiguous: bool,
    activation: str | None,
    residual: bool,
    pool: Pool,
    threads: int,
) -> _Program:
    plan = plan_of(shape, dtype.itemsize, contiguous, pool, threads)
    layout, bf16 = "rows_" if plan.rows else "planes_", dtype == torch.bfloat16
    compiled_pool = (*pool,) if isinstance(pool, MaxPool) else pool is not None

    def step(name: str) -> tuple[Step, ...]:
        return (Step(Key(layout + name, bf16, activation, residual, compiled_pool), once=False),)

    statistics = (
        Step(Key(layout + "statistics", bf16), once=False),
        Step(Key("finish_statistics"), once=True),
    )
    forward, apply = step("forward"), step("apply")
    train = step("train") if plan.fused else statistics + forward
    reduce = (*step("reduce"), Step(Key("finish_gradients"), once=True))
    backward = step("backward") if plan.fused else ()
    return _Program(plan, statistics, train, forward, reduce, apply, backward)


def _beside(t: Tensor, x: Tensor) -> Tensor:
    """``t`` with the dtype and layout of ``x``."""
    return like(t if t.dtype == x.dtype else t.to(x.dtype), x)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _parameter(t: Tensor | None) -> Tensor | None:
    """A parameter as contiguous float32."""
    if t is None or (t.dtype == torch.float32 and t.is_contiguous()):
        return t
    return t.to(torch.float32).contiguous()


def _workspace(nbytes: int) -> int:
    """The address of working memory that this Python thread keeps and reuses."""
    held: tuple[Tensor, int, int] = getattr(_local, "held", _NOTHING)
    if held[2] < nbytes:
        block = torch.empty(max(nbytes, 1 << 16), dtype=torch.uint8)
        held = _local.held = (block, block.data_ptr(), block.numel())
    return held[1]


def _launch(plan: Plan, steps: tuple[Step, ...], fields: dict[str, Any], alone: bool = False) -> None:
    """Run steps one after the other on the same ``Arguments``; ``alone``: not in a training step."""
    sums = _workspace(plan.bytes)
    fields["sums"], fields["scratch"] = sums, sums + plan.own
    args = _pack(fields, plan.alone if alone else plan.sizes)
    run(steps, args, plan.parts, plan.threads)


def _channelwise(x: Tensor) -> Tensor:
    return torch.empty(x.shape[1], dtype=torch.float32)


def _output(x: Tensor, pool: Pool) -> Tensor:
    return empty_like(x) if pool is None else empty(pooled(x.shape, pool), x)


def codes_of(x: Tensor, pool: Pool) -> Tensor | None:
    """What a forward pass writes and the backward pass reads besides: which element of a window won."""
    if not isinstance(pool, MaxPool):
        return None
    return empty(pooled(x.shape, pool), x, torch.uint8)


# --- forward ----------------------------------------------------------------------------------------------


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, float32 of shape (C,)."""
    x, program = _program_of(x, None, None, None)
    mean, var = _channelwise(x), _channelwise(x)
    fields = {"x": x.data_ptr(), "mean": mean.data_ptr(), "var": var.data_ptr()}
    _launch(program.plan, program.statistics, fields)
    return mean, var


def forward_train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    pool: Pool,
    codes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of ``x`` and the output under them: ``(out, mean, var, invstd)``; ``var`` is biased."""
    x, program = _program_of(x, residual, activation, pool)
    weight, bias = _parameter(weight), _parameter(bias)
    residual = None if residual is None else _beside(residual, x)
    mean, var, invstd = _channelwise(x), _channelwise(x), _channelwise(x)
    out = _output(x, pool)
    fields = {
        "x": x.data_ptr(),
        "residual": _address(residual),
        "out": out.data_ptr(),
        "codes": _address(codes),
        "mean": mean.data_ptr(),
        "var": var.data_ptr(),
        "invstd": invstd.data_ptr(),
        "weight": _address(weight),
        "bias": _address(bias),
        "eps": eps,
    }
    _launch(program.plan, program.train, fields)
    return out, mean, var, invstd


def forward(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    pool: Pool,
    out: Tensor | None = None,
    codes: Tensor | None = None,
) -> Tensor:
    """The output under the statistics given, as in evaluation; in ``out``, laid out as ``x`` is, if given."""
    x, program = _program_of(x, residual, activation, pool)
    weight, bias = _parameter(weight), _parameter(bias)
    residual = None if residual is None else _beside(residual, x)
    if out is None:
        out = _output(x, pool)
    fields = {
        "x": x.data_ptr(),
        "residual": _address(residual),
        "out": out.data_ptr(),
        "codes": _address(codes),
        "mean": mean.data_ptr(),
        "invstd": invstd.data_ptr(),
        "weight": _address(weight),
        "bias": _address(bias),
    }
    _launch(program.plan, program.forward, fields, alone=True)
    return out


# --- backward ---------------------------------------------------------------------------------------------


class _Backward(NamedTuple):
    """The tensors every backward kernel reads, in one layout."""

    program: _Program
    grad: Tensor
    x: Tensor
    mean: Tensor
    invstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    codes: Tensor | None

    def linear(self, grad: Tensor) -> "_Backward":
        """The same layer without what follows the normalisation; ``grad`` is the gradient there."""
        program = _program_of(self.x, None, None, None)[1]
        return self._replace(program=program, grad=grad, residual=None, codes=None)

    def launch(self, steps: tuple[Step, ...], results: dict[str, int]) -> None:
        """Run; ``results`` are the addresses of dx, dresidual, dweight, dbias, mean_dz and mean_dz_xhat."""
        fields = {
            **results,
            "x": self.x.data_ptr(),
            "residual": _address(self.residual),
            "grad": self.grad.data_ptr(),
            "codes": _address(self.codes),
            "mean": self.mean.data_ptr(),
            "invstd": self.invstd.data_ptr(),
            "weight": _address(self.weight),
            "bias": _address(self.bias),
        }
        _launch(self.program.plan, steps, fields)


def _prepare(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    pool: Pool,
    codes: Tensor | None,
) -> _Backward:
    x, program = _program_of(x, residual, activation, pool)
    residual = None if residual is None else _beside(residual, x)
    given = (mean, invstd, _parameter(weight), _parameter(bias), residual, codes)
    return _Backward(program, _beside(grad, x), x, *given)


def backward_reduce(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    pool: Pool,
    codes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per channel Σdz and Σdz·xhat: the gradients of bias and weight."""
    job = _prepare(grad, x, mean, invstd, weight, bias, residual, activation, pool, codes)
    sum_dz, sum_dz_xhat = _channelwise(x), _channelwise(x)
    job.launch(job.program.reduce, {"dweight": sum_dz_xhat.data_ptr(), "dbias": sum_dz.data_ptr()})
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
    pool: Pool,
    mean_dz: Tensor,
    mean_dz_xhat: Tensor,
    need_residual: bool,
    codes: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``dx``, and the residual's gradient if wanted; both means are zero where the statistics were given."""
    job = _prepare(grad, x, mean, invstd, weight, bias, residual, activation, pool, codes)
    dx = empty_like(job.x)
    dresidual = empty_like(job.x) if need_residual else None
    results = {
        "dx": dx.data_ptr(),
        "dresidual": _address(dresidual),
        "mean_dz": mean_dz.data_ptr(),
        "mean_dz_xhat": mean_dz_xhat.data_ptr(),
    }
    job.launch(job.program.apply, results)
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
    pool: Pool,
    need_residual: bool,
    codes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``(dx, dweight, dbias, dresidual)``, the batch's own statistics differentiated."""
    job = _prepare(grad, x, mean, invstd, weight, bias, residual, activation, pool, codes)
    dx, dweight, dbias = empty_like(job.x), _channelwise(x), _channelwise(x)
    dresidual = empty_like(job.x) if need_residual else None
    plan = job.program.plan
    mean_dz = _workspace(plan.bytes) + plan.means
    results = {
        "dx": dx.data_ptr(),
        "dresidual": _address(dresidual),
        "dweight": dweight.data_ptr(),
        "dbias": dbias.data_ptr(),
        "mean_dz": mean_dz,
        "mean_dz_xhat": mean_dz + 4 * x.shape[1],
    }
    if plan.fused and (residual is None) == (dresidual is None):
        job.launch(job.program.backward, results)
    elif dresidual is None:
        job.launch(job.program.reduce + job.program.apply, results)
    else:  # the first pass has written dz
        job.launch(job.program.reduce, results)
        linear = job.linear(dresidual)  # its working memory is no larger, and begins alike: the means stay
        linear.launch(linear.program.apply, {**results, "dresidual": 0})
    return dx, dweight, dbias, dresidual


# --- running statistics -----------------------------------------------------------------------------------


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int,
    factor: float,
    skip_nonfinite: bool,
) -> bool:
    """Move the running statistics towards the batch's, in place; ``factor`` is the weight of the new.

    ``var`` is the batch's biased variance over ``count`` values; what is stored is the unbiased one. With
    ``skip_nonfinite`` a batch that has an infinite or NaN statistic changes nothing, and the answer is False.
    """
    if not (_plain(running_mean) and _plain(running_var)):
        return _update_by_torch(running_mean, running_var, mean, var, count, factor, skip_nonfinite)
    done = ctypes.c_int64(0)
    fields = {
        "mean": mean.data_ptr(),
        "var": var.data_ptr(),
        "running_mean": running_mean.data_ptr(),
        "running_var": running_var.data_ptr(),
        "done": ctypes.addressof(done),
        "channels": mean.numel(),
        "samples": count,
        "skip": skip_nonfinite,
        "factor": factor,
    }
    call(_UPDATE, _pack_running(fields))
    return bool(done.value)


def _plain(t: Tensor) -> bool:
    return t.dtype is torch.float32 and t.is_contiguous()


def _update_by_torch(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int,
    factor: float,
    skip_nonfinite: bool,
) -> bool:
    """The same for buffers of another dtype or layout."""
    with torch.no_grad():
        if skip_nonfinite and not bool(torch.isfinite(mean).all() & torch.isfinite(var).all()):
            return False
        unbiased = var.double() * (count / (count - 1)) if count > 1 else var * math.inf
        running_mean.copy_(running_mean.double() * (1 - factor) + mean.double() * factor)
        running_var.copy_(running_var.double() * (1 - factor) + unbiased * factor)
    return True
