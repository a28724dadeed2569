"""The functions of a backend, as launches. Nothing here waits for the GPU or reads from it."""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...epilogue import NOTHING, Epilogue, Pool, pooled_shape
from ..backend import Call, Gradients, Normalized, Running, lacking
from ..layout import dense, empty, is_rows, like, readable
from ..tensors import enter
from . import backward_kernels, forward_kernels, plan

MERGE_TILE = 4096
RUNNING_BLOCK = 1024
# A chip for the interpreter: so small that shapes a test can afford are split, merged and kept whole.
INTERPRETED = plan.Chip(multiprocessors=2, cache_bytes=1 << 16)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)  # Triton's own minimum, and the first with bfloat16

# --- what this backend takes ------------------------------------------------------------------------------


@cache
def _unfit_device(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device; the answer cannot change while the process lives."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        why = "Triton's interpreter (TRITON_INTERPRET=1) runs on CPU tensors only"
        return None if device.type == "cpu" else why
    if device.type != "cuda":
        if torch.cuda.is_available():
            return f"the tensor is on {device}, the Triton kernels read CUDA tensors; use .to('cuda')"
        if torch.version.cuda is None:
            return "this PyTorch was built without CUDA; install a CUDA build from pytorch.org"
        return "PyTorch finds no CUDA device; check the driver with nvidia-smi and CUDA_VISIBLE_DEVICES"
    if torch.version.hip is not None:
        return "the kernels are written and checked for NVIDIA GPUs; this PyTorch is built for ROCm"
    if torch.cuda.get_device_capability(device) < _OLDEST:
        name = torch.cuda.get_device_name(device)
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"{name} has compute capability {found}; Triton needs 8.0 (Ampere) or newer"
    return None


def unsupported(x: Tensor, residual: Tensor | None, epilogue: Epilogue) -> str | None:
    """Why these kernels cannot take the tensors, None if they can."""
    return _unfit_device(x.device) or lacking(x, epilogue, _DTYPES, max_pool=False)


def codes_of(x: Tensor, pool: Pool) -> Tensor | None:
    """No codes: these kernels have no max pooling."""
    return None


# --- the chip, and working memory -------------------------------------------------------------------------


@cache
def _chip(device: torch.device) -> plan.Chip:
    if device.type != "cuda":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    return plan.Chip(properties.multi_processor_count, properties.L2_cache_size)


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device and its current stream: make them those of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _single(x: Tensor, *shape: int) -> Tensor:
    """A float32 tensor beside ``x``, an allocation of its own.

    An operator's outputs may not share memory, and pointers not aligned compile kernels of their own.
    """
    return torch.empty(shape, dtype=torch.float32, device=x.device)


@cache
def _merge_tile(splits: int, C: int) -> dict[str, Any]:
    """A tile that holds every split of a few channels."""
    bk = plan.power_of_two(splits)
    return {
        "BC": max(1, min(MERGE_TILE // bk, plan.power_of_two(C), 32)),
        "BK": bk,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }


def _moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(mean, var, invstd)`` of a dense ``x`` in a reduction over the whole chip."""
    C = x.shape[1]
    mean, var, invstd = _single(x, C), _single(x, C), _single(x, C)
    t = plan.tile(plan.view_of(x.shape, is_rows(x), None, x.itemsize), 2, False)
    n, c, s, *_ = t.extents
    splits = plan.splits(t, _chip(x.device))
    if splits == 1:
        forward_kernels.whole_channels[(t.blocks,)](
            x, None, None, mean, var, invstd, None, None, eps, *t.extents,
            APPLY=False, ACT=None, POOL=1, **t.shape,
        )  # fmt: skip
        return mean, var, invstd
    part = _single(x, 4, splits, C)
    forward_kernels.partial_statistics[(t.blocks, splits)](
        x, part, n, c, s, splits, **t.shape, maxnreg=plan.REDUCTION_REGISTERS
    )
    merge = _merge_tile(splits, C)
    grid = (-(-C // merge["BC"]),)
    forward_kernels.merge_statistics[grid](part, mean, var, invstd, C, splits, eps, **merge)
    return mean, var, invstd


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all but axis 1, float32 ``(C,)``."""
    x = dense(x)
    with _on(x):
        return _moments(x, 1.0)[:2]


def _view(call: Call, pool: Any) -> plan.View:
    return plan.view_of(call.x.shape, is_rows(call.x), pool, call.x.itemsize)


def forward_train(call: Call, codes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training: ``(out, mean, var, invstd)``."""
    call = readable(call)
    x, weight, bias, residual, (activation, pool), eps = call
    view = _view(call, pool)
    t = plan.owned(view, 1 if residual is None else 2, _chip(x.device))
    if t is None:
        with _on(x):
            mean, var, invstd = _moments(x, eps)
        return forward(Normalized(call, mean, invstd)), mean, var, invstd
    out = empty(pooled_shape(x.shape, pool), x)
    mean, var, invstd = _single(x, view.C), _single(x, view.C), _single(x, view.C)
    with _on(x):
        forward_kernels.whole_channels[(t.blocks,)](
            x, residual, out, mean, var, invstd, weight, bias, eps, *t.extents,
            APPLY=True, ACT=activation, POOL=view.pool, **t.shape,
        )  # fmt: skip
    return out, mean, var, invstd


def forward(normalized: Normalized) -> Tensor:
    """The output for given statistics."""
    call = readable(normalized.call)
    x, weight, bias, residual, (activation, pool), _ = call
    out = empty(pooled_shape(x.shape, pool), x)
    if out.numel():
        view = _view(call, pool)
        t = plan.tile(view, 1 if residual is None else 2, False)
        with _on(x):
            forward_kernels.normalise[(t.blocks * t.tiles,)](
                x, residual, out, normalized.mean, normalized.invstd, weight, bias, *t.extents,
                ACT=activation, POOL=view.pool, **t.shape,
            )  # fmt: skip
    return out


def _sums(grad: Tensor, normalized: Normalized, view: plan.View, dz: Tensor | None) -> tuple[Tensor, Tensor]:
    """``sum(dz)`` and ``sum(dz * xhat)``, ``(C,)``, by the whole chip; fills ``dz`` if given."""
    (x, weight, bias, residual, (activation, _), _), mean, invstd, _ = normalized
    t = plan.tile(view, 2, True)
    splits = plan.splits(t, _chip(x.device))
    part, part_xhat = _single(x, splits, view.C), _single(x, splits, view.C)
    backward_kernels.partial_sums[(t.blocks, splits)](
        grad, x, residual, dz, part, part_xhat, mean, invstd, weight, bias, splits, *t.extents,
        ACT=activation, POOL=view.pool, **t.shape, maxnreg=plan.REDUCTION_REGISTERS,
    )  # fmt: skip
    if splits == 1:
        return part[0], part_xhat[0]
    sum_dz, sum_dz_xhat = _single(x, view.C), _single(x, view.C)
    merge = _merge_tile(splits, view.C)
    grid = (-(-view.C // merge["BC"]),)
    backward_kernels.merge_sums[grid](part, part_xhat, sum_dz, sum_dz_xhat, view.C, splits, **merge)
    return sum_dz, sum_dz_xhat


def _prepare(grad: Tensor, normalized: Normalized) -> tuple[Tensor, Normalized, plan.View]:
    """Gradient and call in one layout, and the view of it."""
    call = readable(normalized.call)
    return like(grad, call.x), normalized._replace(call=call), _view(call, call.epilogue.pool)


def backward_reduce(grad: Tensor, normalized: Normalized) -> tuple[Tensor, Tensor]:
    """``(sum_dz, sum_dz_xhat)``, float32 ``(C,)``: the gradients of bias and weight."""
    grad, normalized, view = _prepare(grad, normalized)
    x = normalized.call.x
    if not x.numel():
        return x.new_zeros(x.shape[1], dtype=torch.float32), x.new_zeros(x.shape[1], dtype=torch.float32)
    with _on(x):
        return _sums(grad, normalized, view, None)


def _input_gradient(
    grad: Tensor,
    normalized: Normalized,
    view: plan.View,
    dz: Tensor | None,
    sums: tuple[Tensor, Tensor],
    per_value: float,
) -> Tensor:
    """dx, with ``per_value`` times the sums of dz and dz * xhat as means; fills ``dz`` if given."""
    (x, weight, bias, residual, (activation, _), _), mean, invstd, _ = normalized
    dx = torch.empty_like(x)
    if x.numel():
        t = plan.tile(view, 2, True)
        backward_kernels.input_gradient[(t.blocks * t.tiles,)](
            grad, x, residual, dx, dz, *sums, mean, invstd, weight, bias, per_value, *t.extents,
            ACT=activation, POOL=view.pool, **t.shape,
        )  # fmt: skip
    return dx


def backward_apply(
    grad: Tensor, normalized: Normalized, means: tuple[Tensor, Tensor], need_residual: bool
) -> tuple[Tensor, Tensor | None]:
    """``(dx, dresidual)`` for given means of dz and dz * xhat (both zero in evaluation)."""
    grad, normalized, view = _prepare(grad, normalized)
    x = normalized.call.x
    dz = torch.empty_like(x) if need_residual else None
    with _on(x):
        return _input_gradient(grad, normalized, view, dz, means, 1.0), dz


def backward(grad: Tensor, normalized: Normalized, need_residual: bool) -> Gradients:
    """``(dx, dweight, dbias, dresidual)``, the statistics differentiated."""
    grad, normalized, view = _prepare(grad, normalized)
    call, mean, invstd, _ = normalized
    x, weight, bias, residual, (activation, _), _ = call
    per_value = x.shape[1] / max(1, x.numel())
    dz = torch.empty_like(x) if need_residual else None
    t = plan.owned(view, 2 if residual is None else 3, _chip(x.device))
    with _on(x):
        if t is None:
            sums = _sums(grad, normalized, view, dz)
            if dz is None:
                dx = _input_gradient(grad, normalized, view, None, sums, per_value)
            else:  # it is stored: from here on it is the gradient of a batch norm without an epilogue
                linear = normalized._replace(call=call._replace(residual=None, epilogue=NOTHING))
                dx = _input_gradient(dz, linear, _view(call, None), None, sums, per_value)
        else:
            dx, sums = torch.empty_like(x), (_single(x, view.C), _single(x, view.C))
            backward_kernels.whole_channels_backward[(t.blocks,)](
                grad, x, residual, dx, dz, *sums, mean, invstd, weight, bias, per_value, *t.extents,
                ACT=activation, POOL=view.pool, **t.shape,
            )  # fmt: skip
    return dx, sums[1], sums[0], dz


def update_running(running: Running, mean: Tensor, var: Tensor, count: int) -> bool | Tensor:
    """Move the running statistics towards the batch's, in place.

    ``var`` is the batch's biased variance over ``count`` values; what is stored is the unbiased one. With
    ``skip_nonfinite`` a batch that has an infinite or NaN statistic changes nothing, and whether it was
    counted is a boolean tensor on the device: reading it is what would make the host wait.
    """
    if not (_plain(running.mean) and _plain(running.var)):
        return enter(running, mean, var * (count / (count - 1)))
    accepted = mean.new_empty((), dtype=torch.uint8) if running.skip_nonfinite else None
    with _on(mean):
        forward_kernels.update_running[(1,)](
            running.mean, running.var, mean, var, accepted, running.factor, count / max(1, count - 1),
            mean.numel(), BC=RUNNING_BLOCK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return True if accepted is None else accepted.view(torch.bool)


def _plain(t: Tensor | None) -> bool:
    return t is not None and t.dtype is torch.float32 and t.is_contiguous()
