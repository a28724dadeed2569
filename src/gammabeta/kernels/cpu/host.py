"""Batch normalization on the CPU: what ``gammabeta.kernels`` promises, on the kernels of ``jit``.

This module looks at tensors, cuts the work and calls; the arithmetic is in ``jit``. Tensors that lie
in memory neither contiguous nor channels_last are copied into the nearer of the two first.
"""

import ctypes
import threading
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...epilogue import NOTHING, Epilogue, MaxPool, Pool, pooled_shape
from ..backend import Call, Gradients, Normalized, Running, lacking
from ..layout import dense, empty, like
from ..tensors import enter
from .allocator import empty_like
from .arguments import Arguments, RunningArguments, packer
from .launch import Step, run
from .launch import call as launch_one
from .plan import Plan, plan_of
from .registry import Key

_DTYPES = (torch.float32, torch.bfloat16)
_NOTHING: tuple[Tensor, int, int] = (torch.empty(0), 0, 0)
_local = threading.local()

_UPDATE = Key("update_running")
_pack, _pack_running = packer(Arguments), packer(RunningArguments)


# --- what this backend takes ------------------------------------------------------------------------------


def unsupported(x: Tensor, residual: Tensor | None, epilogue: Epilogue) -> str | None:
    """Why these kernels cannot take the tensors, None if they can."""
    if not x.is_cpu:
        return f"the tensor is on {x.device}, not on the CPU"
    return lacking(x, epilogue, _DTYPES, max_pool=True)


class _Program(NamedTuple):
    """How tensors of one shape, layout and dtype are worked on, and the kernels for one layer's settings."""

    plan: Plan
    statistics: tuple[Step, ...]
    train: tuple[Step, ...]
    forward: tuple[Step, ...]
    reduce: tuple[Step, ...]
    apply: tuple[Step, ...]
    backward: tuple[Step, ...]  # where one part sees the whole of a channel


@lru_cache(1024)
def _program(
    shape: torch.Size, dtype: torch.dtype, contiguous: bool, residual: bool, epilogue: Epilogue, threads: int
) -> _Program:
    activation, pool = epilogue
    plan = plan_of(shape, dtype.itemsize, contiguous, pool, threads)
    layout, bf16 = "channels_last_" if plan.channels_last else "channels_first_", dtype == torch.bfloat16
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


# A call in a layout that kernels read: x, its program, the kernels' arguments so far, and the residual, which
# may be a copy that has to live until they have run.
_Work = tuple[Tensor, _Program, dict[str, Any], Tensor | None]


def _work(call: Call) -> _Work:
    x, weight, bias, residual, epilogue, eps = call
    contiguous = x.is_contiguous()
    if not contiguous:
        x = dense(x)
        contiguous = x.is_contiguous()
    added = residual is not None
    if added:
        residual = _beside(residual, x)
    program = _program(x.shape, x.dtype, contiguous, added, epilogue, torch.get_num_threads())
    fields = {
        "x": x.data_ptr(),
        "residual": residual.data_ptr() if added else 0,
        "weight": 0 if weight is None else weight.data_ptr(),
        "bias": 0 if bias is None else bias.data_ptr(),
        "eps": eps,
    }
    return x, program, fields, residual


def _work_normalized(normalized: Normalized) -> _Work:
    call, mean, invstd, codes = normalized
    work = _work(call)
    fields = work[2]
    fields["mean"], fields["invstd"] = mean.data_ptr(), invstd.data_ptr()
    if codes is not None:
        fields["codes"] = codes.data_ptr()
    return work


def _beside(t: Tensor, x: Tensor) -> Tensor:
    """``t`` with the dtype and layout of ``x``."""
    return like(t if t.dtype == x.dtype else t.to(x.dtype), x)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


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
    return empty_like(x) if pool is None else empty(pooled_shape(x.shape, pool), x)


def codes_of(x: Tensor, pool: Pool) -> Tensor | None:
    """What a forward pass writes and the backward pass reads besides: which element of a window won."""
    if not isinstance(pool, MaxPool):
        return None
    return empty(pooled_shape(x.shape, pool), x, torch.uint8)


# --- forward ----------------------------------------------------------------------------------------------


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, float32 of shape (C,)."""
    x, program, fields, _ = _work(Call(x, None, None, None, NOTHING, 0.0))
    mean, var = _channelwise(x), _channelwise(x)
    fields["mean"], fields["var"] = mean.data_ptr(), var.data_ptr()
    _launch(program.plan, program.statistics, fields)
    return mean, var


def forward_train(
    call: Call, codes: Tensor | None = None, leak: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of ``x`` and the output under them: ``(out, mean, var, invstd)``; ``var`` is biased.

    ``leak`` has what the activation "prelu" learned, (C,) float32.
    """
    x, program, fields, _kept = _work(call)
    mean, var, invstd = _channelwise(x), _channelwise(x), _channelwise(x)
    out = _output(x, call.epilogue.pool)
    fields["mean"], fields["var"], fields["invstd"] = mean.data_ptr(), var.data_ptr(), invstd.data_ptr()
    fields["out"], fields["codes"], fields["leak"] = out.data_ptr(), _address(codes), _address(leak)
    _launch(program.plan, program.train, fields)
    return out, mean, var, invstd


def forward(normalized: Normalized, out: Tensor | None = None, leak: Tensor | None = None) -> Tensor:
    """The output under the statistics given, as in evaluation; in ``out``, laid out as ``x`` is, if given."""
    x, program, fields, _kept = _work_normalized(normalized)
    if out is None:
        out = _output(x, normalized.call.epilogue.pool)
    fields["out"], fields["leak"] = out.data_ptr(), _address(leak)
    _launch(program.plan, program.forward, fields, alone=True)
    return out


# --- backward ---------------------------------------------------------------------------------------------


def backward_reduce(grad: Tensor, normalized: Normalized) -> tuple[Tensor, Tensor]:
    """Per channel Σdz and Σdz·xhat: the gradients of bias and weight."""
    x, program, fields, _kept = _work_normalized(normalized)
    grad = _beside(grad, x)
    sum_dz, sum_dz_xhat = _channelwise(x), _channelwise(x)
    fields["grad"], fields["dbias"] = grad.data_ptr(), sum_dz.data_ptr()
    fields["dweight"] = sum_dz_xhat.data_ptr()
    _launch(program.plan, program.reduce, fields)
    return sum_dz, sum_dz_xhat


def backward_apply(
    grad: Tensor,
    normalized: Normalized,
    means: tuple[Tensor, Tensor],
    need_residual: bool,
    leak: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``dx``, and the residual's gradient if wanted; both means are zero where the statistics were given."""
    x, program, fields, _kept = _work_normalized(normalized)
    grad = _beside(grad, x)
    dx = empty_like(x)
    dresidual = empty_like(x) if need_residual else None
    fields["grad"], fields["dx"], fields["dresidual"] = grad.data_ptr(), dx.data_ptr(), _address(dresidual)
    fields["mean_dz"], fields["mean_dz_xhat"] = means[0].data_ptr(), means[1].data_ptr()
    fields["leak"] = _address(leak)
    _launch(program.plan, program.apply, fields)
    return dx, dresidual


def backward(grad: Tensor, normalized: Normalized, need_residual: bool) -> Gradients:
    """``(dx, dweight, dbias, dresidual)``, the batch's own statistics differentiated."""
    x, program, fields, _kept = _work_normalized(normalized)
    grad = _beside(grad, x)
    dx, dweight, dbias = empty_like(x), _channelwise(x), _channelwise(x)
    dresidual = empty_like(x) if need_residual else None
    plan = program.plan
    mean_dz = _workspace(plan.bytes) + plan.means
    fields["grad"], fields["dx"], fields["dresidual"] = grad.data_ptr(), dx.data_ptr(), _address(dresidual)
    fields["dweight"], fields["dbias"] = dweight.data_ptr(), dbias.data_ptr()
    fields["mean_dz"], fields["mean_dz_xhat"] = mean_dz, mean_dz + 4 * x.shape[1]
    if plan.fused and (normalized.call.residual is None) == (dresidual is None):
        _launch(plan, program.backward, fields)
    elif dresidual is None:
        _launch(plan, program.reduce + program.apply, fields)
    else:  # the first pass writes dz, and the second is that of a batch norm without an epilogue
        _launch(plan, program.reduce, fields)
        linear = _program(x.shape, x.dtype, x.is_contiguous(), False, NOTHING, torch.get_num_threads())
        # Its working memory is no larger, and begins alike: the means stay.
        fields |= {"grad": dresidual.data_ptr(), "dresidual": 0, "residual": 0, "codes": 0}
        _launch(linear.plan, linear.apply, fields)
    return dx, dweight, dbias, dresidual


# --- what a mask keeps ------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """A mask as the kernels read it."""

    mask: Tensor  # bool, contiguous (N, *spatial)
    places: Tensor  # int64 (5,): pixels that are kept, far apart
    values: int  # of a channel


_seen = WeakTensorKeyDictionary()  # the layers of a network are given the same mask, one after the other


def kept_of(x: Tensor, mask: Tensor) -> Kept | None:
    """A mask (N, *spatial) for kernels; None where they serve no such call.

    They do not serve fewer channels than threads in a contiguous tensor, nor fewer than two values.
    """
    plan = _program(x.shape, x.dtype, x.is_contiguous(), False, NOTHING, torch.get_num_threads()).plan
    if not (plan.fused or plan.channels_last):
        return None
    version = -1 if mask.is_inference() else mask._version
    found: tuple[int, Kept] | None = _seen.get(mask)
    if found is None or version < 0 or found[0] != version:
        found = _seen[mask] = (version, _kept(mask.contiguous()))
    kept = found[1]
    return kept if kept.values > 1 else None


def _kept(mask: Tensor) -> Kept:
    places = mask.view(-1).nonzero().squeeze(1)
    count = len(places)
    far = places[[0, count // 4, count // 2, 3 * count // 4, count - 1]] if count else places
    # A view of its own, so that what is remembered does not keep the mask alive.
    return Kept(mask.detach(), far, count)


@lru_cache(1024)
def _masked_steps(
    channels_last: bool, bf16: bool, activation: str | None, residual: bool, names: tuple[str, ...]
) -> tuple[Step, ...]:
    """The kernels of these names; one that finishes is the same as without a mask."""
    layout = "channels_last" if channels_last else "channels_first"

    def step(name: str) -> Step:
        if name.startswith("finish"):
            return Step(Key(name), once=True)
        end = (None, False) if name == "statistics" else (activation, residual)
        return Step(Key(f"{layout}_masked_{name}", bf16, *end), once=False)

    return tuple(map(step, names))


def _launch_masked(work: _Work, kept: Kept, names: tuple[str, ...], activation: str | None) -> None:
    x, program, fields, residual = work
    fields["mask"], fields["places"] = kept.mask.data_ptr(), kept.places.data_ptr()
    fields["kept"] = kept.values
    last, bf16 = program.plan.channels_last, x.dtype is torch.bfloat16
    _launch(program.plan, _masked_steps(last, bf16, activation, residual is not None, names), fields)


def masked_train(call: Call, kept: Kept) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``forward_train`` of what is kept; all else is 0 in the output."""
    work = _work(call)
    x, program, fields, _ = work
    mean, var, invstd, out = _channelwise(x), _channelwise(x), _channelwise(x), empty_like(x)
    fields["mean"], fields["var"], fields["invstd"] = mean.data_ptr(), var.data_ptr(), invstd.data_ptr()
    fields["out"] = out.data_ptr()
    kernels = ("statistics", "finish_statistics", "forward") if program.plan.channels_last else ("train",)
    _launch_masked(work, kept, kernels, call.epilogue.activation)
    return out, mean, var, invstd


def masked_backward(grad: Tensor, normalized: Normalized, kept: Kept) -> Gradients:
    """``backward`` of ``masked_train``; the residual's gradient too, if there is a residual."""
    work = _work_normalized(normalized)
    x, program, fields, residual = work
    grad, plan = _beside(grad, x), program.plan
    dx, dweight, dbias = empty_like(x), _channelwise(x), _channelwise(x)
    dresidual = None if residual is None else empty_like(x)
    mean_dz = _workspace(plan.bytes) + plan.means
    fields["grad"], fields["dx"], fields["dresidual"] = grad.data_ptr(), dx.data_ptr(), _address(dresidual)
    fields["dweight"], fields["dbias"] = dweight.data_ptr(), dbias.data_ptr()
    fields["mean_dz"], fields["mean_dz_xhat"] = mean_dz, mean_dz + 4 * x.shape[1]
    kernels = ("reduce", "finish_gradients", "apply") if plan.channels_last else ("backward",)
    _launch_masked(work, kept, kernels, normalized.call.epilogue.activation)
    return dx, dweight, dbias, dresidual


# --- running statistics -----------------------------------------------------------------------------------


def update_running(running: Running, mean: Tensor, var: Tensor, count: int) -> bool | Tensor:
    """Move the running statistics towards the batch's, in place, by one small kernel on the calling thread.

    ``var`` is the batch's biased variance over ``count`` values; what is stored is the unbiased one. With
    ``skip_nonfinite`` a batch that has an infinite or NaN statistic changes nothing, and the answer is False.
    """
    running_mean, running_var, factor, skip_nonfinite = running
    if running_mean is None or running_var is None:
        return True
    if not (_plain(running_mean) and _plain(running_var)):
        return enter(running, mean, var * (count / (count - 1)))
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
    launch_one(_UPDATE, _pack_running(fields))
    return bool(done.value)


def _plain(t: Tensor) -> bool:
    return t.dtype is torch.float32 and t.is_contiguous()
