"""The functions of the kernels' table, as launches. Nothing here waits for the GPU or reads from it."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..layout import dense, empty, is_rows, like, pooled
from . import backward_kernels, forward_kernels, plan

MERGE_TILE = 4096
RUNNING_BLOCK = 1024
# The interpreter's stand-in for a chip: so small that shapes a test can afford are split, merged and owned.
INTERPRETED = plan.Chip(multiprocessors=2, cache_bytes=1 << 16)


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


def _moments(x: Tensor, rows: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(mean, var, invstd)`` of a dense ``x`` in a reduction over the whole chip."""
    C = x.shape[1]
    mean, var, invstd = _single(x, C), _single(x, C), _single(x, C)
    t = plan.tile(plan.view_of(x.shape, rows, None, x.itemsize), 2, False)
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
    rows = is_rows(x)
    with _on(x):
        mean, var, _ = _moments(x, rows, 1.0)
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
    """Training: ``(out, mean, var, invstd)``."""
    x = dense(x)
    rows = is_rows(x)
    residual = None if residual is None else like(residual, x)
    view = plan.view_of(x.shape, rows, pool, x.itemsize)
    t = plan.owned(view, 1 if residual is None else 2, _chip(x.device))
    if t is None:
        with _on(x):
            mean, var, invstd = _moments(x, rows, eps)
        return forward(x, mean, invstd, weight, bias, residual, activation, pool), mean, var, invstd
    out = empty(pooled(x.shape, pool), x)
    mean, var, invstd = _single(x, view.C), _single(x, view.C), _single(x, view.C)
    with _on(x):
        forward_kernels.whole_channels[(t.blocks,)](
            x, residual, out, mean, var, invstd, weight, bias, eps, *t.extents,
            APPLY=True, ACT=activation, POOL=view.pool, **t.shape,
        )  # fmt: skip
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
) -> Tensor:
    """The output for given statistics."""
    x = dense(x)
    rows = is_rows(x)
    residual = None if residual is None else like(residual, x)
    out = empty(pooled(x.shape, pool), x)
    if out.numel():
        view = plan.view_of(x.shape, rows, pool, x.itemsize)
        t = plan.tile(view, 1 if residual is None else 2, False)
        with _on(x):
            forward_kernels.normalise[(t.blocks * t.tiles,)](
                x, residual, out, mean, invstd, weight, bias, *t.extents,
                ACT=activation, POOL=view.pool, **t.shape,
            )  # fmt: skip
    return out


def _sums(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dz: Tensor | None,
    activation: str | None,
    view: plan.View,
) -> tuple[Tensor, Tensor]:
    """``sum(dz)`` and ``sum(dz * xhat)``, ``(C,)``, by the whole chip; fills ``dz`` if given."""
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
    """``(sum_dz, sum_dz_xhat)``, float32 ``(C,)``: the gradients of bias and weight."""
    x = dense(x)
    rows = is_rows(x)
    if not x.numel():
        return x.new_zeros(x.shape[1], dtype=torch.float32), x.new_zeros(x.shape[1], dtype=torch.float32)
    grad, residual = like(grad, x), None if residual is None else like(residual, x)
    view = plan.view_of(x.shape, rows, pool, x.itemsize)
    with _on(x):
        return _sums(grad, x, mean, invstd, weight, bias, residual, None, activation, view)


def _input_gradient(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dz: Tensor | None,
    activation: str | None,
    view: plan.View,
    sum_dz: Tensor,
    sum_dz_xhat: Tensor,
    per_value: float,
) -> Tensor:
    """dx, with ``per_value`` times the sums as means; fills ``dz`` if given."""
    dx = torch.empty_like(x)
    if x.numel():
        t = plan.tile(view, 2, True)
        backward_kernels.input_gradient[(t.blocks * t.tiles,)](
            grad, x, residual, dx, dz, sum_dz, sum_dz_xhat, mean, invstd, weight, bias, per_value, *t.extents,
            ACT=activation, POOL=view.pool, **t.shape,
        )  # fmt: skip
    return dx


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
    """``(dx, dresidual)`` for given means of dz and dz * xhat (both zero in evaluation)."""
    x = dense(x)
    rows = is_rows(x)
    grad, residual = like(grad, x), None if residual is None else like(residual, x)
    view = plan.view_of(x.shape, rows, pool, x.itemsize)
    dz = torch.empty_like(x) if need_residual else None
    with _on(x):
        dx = _input_gradient(
            grad, x, mean, invstd, weight, bias, residual, dz, activation, view, mean_dz, mean_dz_xhat, 1.0
        )
    return dx, dz


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
    """``(dx, dweight, dbias, dresidual)``, the statistics differentiated."""
    x = dense(x)
    rows = is_rows(x)
    grad, residual = like(grad, x), None if residual is None else like(residual, x)
    view = plan.view_of(x.shape, rows, pool, x.itemsize)
    per_value = x.shape[1] / max(1, x.numel())
    dz = torch.empty_like(x) if need_residual else None
    t = plan.owned(view, 2 if residual is None else 3, _chip(x.device))
    with _on(x):
        if t is None:
            sums = _sums(grad, x, mean, invstd, weight, bias, residual, dz, activation, view)
            if (
                dz is not None
            ):  # it is stored, and stands for grad, residual and activation in the second pass
                grad, residual, activation = dz, None, None
                view = plan.view_of(x.shape, rows, None, x.itemsize)
            dx = _input_gradient(
                grad, x, mean, invstd, weight, bias, residual, None, activation, view, *sums, per_value
            )
        else:
            dx, sums = torch.empty_like(x), (_single(x, view.C), _single(x, view.C))
            backward_kernels.whole_channels_backward[(t.blocks,)](
                grad, x, residual, dx, dz, *sums, mean, invstd, weight, bias, per_value, *t.extents,
                ACT=activation, POOL=view.pool, **t.shape,
            )  # fmt: skip
    return dx, sums[1], sums[0], dz


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int,
    factor: float,
    skip_nonfinite: bool,
) -> bool | Tensor:
    """Move the running statistics towards the batch's, in place; ``factor`` is the weight of the new.

    ``var`` is the batch's biased variance over ``count`` values; what is stored is the unbiased one. With
    ``skip_nonfinite`` a batch that has an infinite or NaN statistic changes nothing, and whether it was
    counted is a boolean tensor on the device: reading it is what would make the host wait.
    """
    accepted = mean.new_empty((), dtype=torch.uint8) if skip_nonfinite else None
    with _on(mean):
        forward_kernels.update_running[(1,)](
            running_mean, running_var, mean, var, accepted, factor, count / max(1, count - 1), mean.numel(),
            BC=RUNNING_BLOCK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return True if accepted is None else accepted.view(torch.bool)
