"""The error against float64 is at most twice torch's own, plus a floor of a few roundings."""

import itertools

import pytest
import torch

from gammabeta.epilogue import NOTHING, Epilogue
from gammabeta.kernels.backend import Call
from gammabeta.kernels.cpu import host
from tests import oracle

EPS = 1e-5
size = oracle.root_mean_square
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


@pytest.mark.parametrize("name", CASES)
def test_error_is_within_twice_torchs(name):
    torch.manual_seed(0)
    for shape, last in itertools.product(SHAPES, (False, True)):
        x = CASES[name](torch.randn(shape))
        if last and len(shape) > 2:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        weight, bias, grad = torch.rand(shape[1]) + 0.5, torch.randn(shape[1]), torch.randn(shape)
        call = Call(x, weight, bias, None, NOTHING, EPS)
        (ours, given), torchs, true = (
            oracle.by_kernels(host, call, grad),
            oracle.by_torch(call, grad),
            oracle.truth(call, grad),
        )
        # Gradients are sums that may cancel; then what is added up is the measure.
        slope = (weight * given.invstd).view(-1, *[1] * (len(shape) - 2))
        least = {"out": 0.0, "dx": size(grad * slope), "dweight": size(grad), "dbias": size(grad)}
        for what, at_least in least.items():
            mine, exact, theirs = (getattr(outcome, what) for outcome in (ours, true, torchs))
            scale = max(size(exact), at_least)
            oracle.assert_within(
                mine, exact, theirs, floor=FLOOR, scale=scale, size=size, what=(shape, last, what)
            )


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
    exact_mean, exact_var = oracle.statistics(x)
    mean, var = host.statistics(x)
    assert torch.equal(mean, exact_mean.float())
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-6, atol=0)


OUTLIERS = {
    "few among normal": lambda x: torch.where(torch.rand_like(x) < 3e-3, x * 1e3, x),
    "one among zeros": lambda x: torch.zeros_like(x).index_put((torch.tensor(0),) * 4, torch.tensor(777.7)),
    "first image of another level": lambda x: torch.cat([x[:1] * 0 + 12.34, x[1:] * 0 + 0.3]),
    "last image of another level": lambda x: torch.cat([x[:-1] * 0 + 0.3, x[-1:] * 0 + 12.34]),
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", OUTLIERS)
def test_outliers_cost_the_variance_no_precision(name, last):
    for seed in range(40):
        torch.manual_seed(seed)
        shape = [int(torch.randint(low, high, ())) for low, high in ((3, 9), (1, 9), (1, 60), (1, 60))]
        x = OUTLIERS[name](torch.randn(shape))
        x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        mean, var = host.statistics(x)
        true_mean, true_var = oracle.statistics(x)
        assert ((var - true_var).abs() <= 8 * 2.0**-23 * true_var).all(), (seed, shape)
        reach = true_mean.abs() + true_var.sqrt()
        assert ((mean - true_mean).abs() <= 2 * 2.0**-23 * reach).all(), (seed, shape)


@pytest.mark.parametrize("where", [0, 17])
@pytest.mark.parametrize("last", [False, True])
def test_nan_stays_in_its_channel(where, last):
    x = torch.randn(2, 4, 5, 7)
    x[0, 2].view(-1)[where] = float("nan")
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    out, mean, var, _ = host.forward_train(Call(x, None, None, None, Epilogue("relu"), EPS))
    assert out[:, 2].isnan().all()
    assert mean[2].isnan()
    assert var[2].isnan()
    assert out[:, [0, 1, 3]].isfinite().all()
