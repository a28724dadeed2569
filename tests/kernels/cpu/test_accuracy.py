"""The error against float64 is at most twice torch's own, plus a floor of a few roundings."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gammabeta.kernels.cpu import host

EPS = 1e-5
FLOOR = 4 * torch.finfo(torch.float32).eps
CASES = {
    "plain": lambda x: x * 2 + 1,
    "far from zero": lambda x: x * 1e-2 + 1e4,
    "first value an outlier": lambda x: torch.where(
        torch.arange(x.numel()).view(x.shape) < x[0].numel(), 1e4, x
    ),
    "small": lambda x: x * 1e-3 + 1,
}
SHAPES = ((2, 3), (300, 20), (2, 5, 7), (4, 20, 31, 33), (1, 3, 300, 400), (3, 1001, 3, 3))


def size(t: Tensor) -> float:
    """Root mean square."""
    return t.double().square().mean().sqrt().item()


def error(found: Tensor, exact: Tensor, least: float) -> float:
    """Relative to the exact value's size, or to ``least`` where the exact value is a cancelled sum."""
    return size(found.double() - exact) / max(size(exact), least)


@pytest.mark.parametrize("name", CASES)
def test_error_is_within_twice_torchs(name):
    torch.manual_seed(0)
    for shape, last in itertools.product(SHAPES, (False, True)):
        x = CASES[name](torch.randn(shape))
        if last and len(shape) > 2:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        weight, bias, grad = torch.rand(shape[1]) + 0.5, torch.randn(shape[1]), torch.randn(shape)
        found = {}
        for dtype in (torch.float64, torch.float32):
            leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
            out = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], True, 0.1, EPS)
            found[dtype] = [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]
        ours, mean, _, invstd = host.forward_train(x, weight, bias, None, EPS, None, None)
        dx, dweight, dbias, _ = host.backward(grad, x, mean, invstd, weight, bias, None, None, None, False)
        for what, a, b, exact in zip(
            ("out", "dx", "dweight", "dbias"),
            (ours, dx, dweight, dbias),
            found[torch.float32],
            found[torch.float64],
            strict=True,
        ):
            # Gradients are sums that may cancel; then what is added up is the measure.
            least = size(grad * (weight * invstd).view(-1, *[1] * (len(shape) - 2)))
            least = {"dx": least, "out": 1e-30}.get(what, size(grad))
            assert error(a, exact, least) <= 2 * error(b, exact, least) + FLOOR, (shape, last, what)


@pytest.mark.parametrize("last", [False, True])
def test_constant_channels_have_no_variance(last):
    x = torch.tensor([3.0, 1e4, -1e-3, 0.1]).view(1, 4, 1, 1).expand(7, 4, 5, 9)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    mean, var = host.statistics(x)
    assert torch.equal(var, torch.zeros(4))
    assert torch.equal(mean, x[0, :, 0, 0])


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("count", [2, 10_000_000])
def test_statistics_of_few_and_of_many_values(count, last):
    torch.manual_seed(0)
    x = torch.randn(2, 2, count // 2) * 1e-2 + 1e4
    if last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    exact_mean = x.double().mean((0, 2))
    exact_var = x.double().var((0, 2), correction=0)
    mean, var = host.statistics(x)
    assert torch.equal(mean, exact_mean.float())
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("where", [0, 17])
@pytest.mark.parametrize("last", [False, True])
def test_nan_stays_in_its_channel(where, last):
    x = torch.randn(2, 4, 5, 7)
    x[0, 2].view(-1)[where] = float("nan")
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    out, mean, var, _ = host.forward_train(x, None, None, None, EPS, "relu", None)
    assert out[:, 2].isnan().all()
    assert mean[2].isnan()
    assert var[2].isnan()
    assert out[:, [0, 1, 3]].isfinite().all()
