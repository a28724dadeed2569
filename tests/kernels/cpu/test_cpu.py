"""Every CPU kernel against the reference in float64, on the same rounded inputs."""

import itertools

import pytest
import torch
from torch import Tensor

from gammabeta.epilogue import ACTIVATIONS, Epilogue, pooled_shape
from gammabeta.kernels.backend import Call, Normalized
from gammabeta.kernels.cpu import host, plan
from tests import oracle

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


def close(ours: Tensor, exact: Tensor) -> None:
    """Within a few roundings of the largest value; there are long sums behind a gradient."""
    oracle.assert_within(ours, exact, floor=2e-6, scale=1 + oracle.largest(exact))


NUMBERED = ("leaky_relu(0.2)", "elu(0.5)", "hardtanh(-2.0, 1.5)")
FEW = {
    ("relu", False, None),
    ("silu", True, 2),
    ("elu(0.5)", False, None),
}  # every kernel there is takes minutes to compile
ALL = itertools.product((None, *ACTIVATIONS, *NUMBERED), (False, True), (None, 2))


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
        call = Call(x, weight, bias, residual, Epilogue(activation, pool), EPS)
        grad = torch.randn(pooled_shape(shape, pool))
        exact = oracle.truth(call, grad)
        out, mean, var, invstd = host.forward_train(call)
        for ours, true in zip((mean, var), oracle.statistics(x), strict=True):
            close(ours, true)
        given = Normalized(call, mean, invstd)
        assert torch.equal(host.forward(given), out), "recomputing an output gives the same bits"
        for ours, true in zip((out, *host.backward(grad, given, with_residual)), exact, strict=True):
            assert (ours is None) is (true is None)
            if true is not None:
                close(ours, true)
        sum_dz, sum_dz_xhat = host.backward_reduce(grad, given)
        close(sum_dz, exact.dbias)
        close(sum_dz_xhat, exact.dweight)
        count = x.numel() // shape[1]
        dx, dresidual = host.backward_apply(grad, given, (sum_dz / count, sum_dz_xhat / count), with_residual)
        close(dx, exact.dx)
        assert (dresidual is None) is not with_residual
        if dresidual is not None:
            close(dresidual, exact.dresidual)


QUICK = ("relu", "elu(0.5)")


@pytest.mark.parametrize(
    "activation",
    [pytest.param(a, marks=() if a in QUICK else pytest.mark.slow) for a in (*ACTIVATIONS, *NUMBERED)],
)
def test_corners_tails_and_nan_are_torch_s(activation):
    """A channel of chosen values, normalised by mean 0 and variance 1: the kernel's own z."""
    corners = [-1e4, -100.0, -30.0, -9.0, -3.0, -2.0, -1.0, -1e-4, 0.0, 1e-4, 1.0, 1.5, 3.0, 6.0, 30.0, 1e4]
    x = torch.tensor([*corners, float("nan"), *torch.linspace(-12, 12, 47).tolist()]).view(1, 1, 64)
    call = Call(x, None, None, None, Epilogue(activation), 0.0)
    zero, one = torch.zeros(1), torch.ones(1)
    given = Normalized(call, zero, one)
    out = host.forward(given)
    dx, _ = host.backward_apply(one.expand(1, 1, 64).contiguous(), given, (zero, zero), False)
    z = x.double().requires_grad_()
    expected = call.epilogue.apply(z)
    (slope,) = torch.autograd.grad(expected.sum(), z)
    slope[x.isnan()] = torch.nan  # the gradient of a normalised NaN
    for ours, true in ((out, expected), (dx, slope)):
        torch.testing.assert_close(ours.double(), true.detach(), rtol=2e-6, atol=2e-7, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "pool"),
    [
        (torch.float32, None),
        (torch.float32, 2),
        (torch.bfloat16, None),
        pytest.param(torch.bfloat16, 2, marks=pytest.mark.slow),
    ],
)
def test_streaming_changes_no_bit(monkeypatch, dtype, layout, pool):
    torch.manual_seed(0)
    for shape in SHAPES:
        x, weight = arranged(torch.randn(shape).to(dtype), layout), torch.randn(shape[1])
        call = Call(x, weight, None, None, Epilogue("relu", pool), EPS)
        grad = torch.randn(pooled_shape(shape, pool)).to(dtype)
        found = []
        for least in (0, 1 << 62):
            monkeypatch.setattr(plan, "_STREAMED", least)
            host._program.cache_clear()
            found.append(oracle.by_kernels(host, call, grad)[0][:2])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    host._program.cache_clear()
