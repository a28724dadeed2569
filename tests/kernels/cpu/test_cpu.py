"""Every CPU kernel against torch's own operations in float64, on the same rounded inputs."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gammabeta.kernels import limits
from gammabeta.kernels.cpu import host, plan

EPS = 1e-5
SHAPES = ((3, 20, 9, 13), (4, 50, 5, 4), (2, 64, 8, 8), (5, 3, 2, 2), (3, 7, 5, 32))
LAYOUTS = ("contiguous", "channels_last")


@pytest.fixture(params=[False, True], ids=["cached", "streamed"])
def streamed(request, monkeypatch):
    """Outputs written past the caches, as large ones are, wherever that is possible at all."""
    monkeypatch.setattr(plan, "_STREAMED", 0 if request.param else 1 << 62)
    host._program.cache_clear()
    yield request.param
    host._program.cache_clear()


def arranged(x: Tensor, layout: str) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def truth(x, weight, bias, residual, activation, pool):
    """Output and gradients in float64 for a random upstream gradient, which is returned too."""
    names = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    leaves = {n: t.double().requires_grad_() for n, t in names.items() if t is not None}
    z = F.batch_norm(leaves["x"], None, None, leaves.get("weight"), leaves.get("bias"), True, 0.1, EPS)
    if residual is not None:
        z = z + leaves["residual"]
    y = getattr(F, activation)(z) if activation else z
    if pool:
        y = F.avg_pool2d(y, pool)
    grad = torch.randn(y.shape, dtype=torch.float64).to(x.dtype)
    y.backward(grad.double())
    return y.detach(), grad, {n: t.grad for n, t in leaves.items()}


def close(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Within a few roundings of the largest value; there are long sums behind a gradient."""
    scale = 1 + exact.abs().max().item()
    bound = scale * (2e-6 if dtype == torch.float32 else 1e-2)
    assert (ours.double() - exact).abs().max().item() <= bound


FEW = {("relu", False, None), ("silu", True, 2)}  # every kernel there is takes minutes to compile
ALL = itertools.product(limits.ACTIVATIONS, (False, True), (None, 2))


@pytest.mark.parametrize(
    ("activation", "with_residual", "pool"),
    [pytest.param(*case, marks=() if case in FEW else pytest.mark.slow) for case in ALL],
)
def test_forward_and_backward_agree_with_float64(streamed, activation, with_residual, pool):
    torch.manual_seed(0)
    for shape, layout in itertools.product(SHAPES, LAYOUTS):
        x = arranged(torch.randn(shape) * 2 + 1, layout)
        residual = arranged(torch.randn(shape), layout) if with_residual else None
        weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
        exact, grad, grads = truth(x, weight, bias, residual, activation, pool)
        options = (weight, bias, residual, activation, pool)
        out, mean, var, invstd = host.forward_train(x, weight, bias, residual, EPS, activation, pool)
        close(out, exact, x.dtype)
        close(mean, x.double().mean((0, 2, 3)), x.dtype)
        close(var, x.double().var((0, 2, 3), correction=0), x.dtype)
        given = (x, mean, invstd, *options)
        assert torch.equal(host.forward(*given), out), "recomputing an output gives the same bits"
        dx, dweight, dbias, dresidual = host.backward(grad, *given, with_residual)
        close(dx, grads["x"], x.dtype)
        close(dweight, grads["weight"], x.dtype)
        close(dbias, grads["bias"], x.dtype)
        sum_dz, sum_dz_xhat = host.backward_reduce(grad, *given)
        close(sum_dz, grads["bias"], x.dtype)
        close(sum_dz_xhat, grads["weight"], x.dtype)
        count = x.numel() // shape[1]
        dx, again = host.backward_apply(
            grad, *given, sum_dz / count, sum_dz_xhat / count, need_residual=with_residual
        )
        close(dx, grads["x"], x.dtype)
        for found in (dresidual, again):
            assert (found is None) is not with_residual
            if found is not None:
                close(found, grads["residual"], x.dtype)


@pytest.mark.parametrize("pool", [None, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streaming_changes_no_bit(monkeypatch, dtype, layout, pool):
    torch.manual_seed(0)
    for shape in SHAPES:
        x, weight = arranged(torch.randn(shape).to(dtype), layout), torch.randn(shape[1])
        grad = torch.randn(F.avg_pool2d(x.float(), pool).shape if pool else shape).to(dtype)
        found = []
        for least in (0, 1 << 62):
            monkeypatch.setattr(plan, "_STREAMED", least)
            host._program.cache_clear()
            out, mean, _, invstd = host.forward_train(x, weight, None, None, EPS, "relu", pool)
            dx = host.backward(grad, x, mean, invstd, weight, None, None, "relu", pool, False)[0]
            found.append((out, dx))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    host._program.cache_clear()
