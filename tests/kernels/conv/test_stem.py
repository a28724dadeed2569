"""The kernels of a convolution with the batch norm behind it, against float64 and torch's own error."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gammabeta.epilogue import ACTIVATIONS, NOTHING, Epilogue
from gammabeta.kernels.backend import Call
from gammabeta.kernels.conv import stem
from tests import oracle

EPS = 1e-5
pytestmark = pytest.mark.skipif(
    stem.unsupported((1, 1, 28, 28), (20, 1, 3, 3), NOTHING) is not None, reason="needs AVX-512"
)


class Case(NamedTuple):
    """Shapes of images and of the convolution's weight, and the pooling."""

    images: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    pool: int | None


CASES = [
    Case((64, 1, 28, 28), (20, 1, 3, 3), 2),  # the notebook's
    Case((3, 1, 28, 28), (20, 1, 3, 3), None),
    Case((2, 3, 34, 34), (64, 3, 3, 3), None),  # four vectors of channels, tiles of five
    Case((5, 2, 15, 12), (7, 2, 3, 2), 2),  # odd in both directions: a row and a column are dropped
    Case((3, 1, 20, 21), (33, 1, 5, 5), 2),
    Case((2, 3, 4, 13), (16, 3, 3, 3), None),  # one vector of channels
    Case((1, 1, 1, 10), (1, 1, 1, 2), None),
    Case((4, 32, 3, 10), (5, 32, 1, 1), 2),  # as many values as a patch may have
]


class Problem(NamedTuple):
    """Everything that goes in, float32."""

    x: Tensor
    weight: Tensor
    gamma: Tensor
    beta: Tensor
    upstream: Tensor


def problem(case: Case, *, mean: float = 0.5, std: float = 1.0) -> Problem:
    x = torch.randn(case.images) * std + mean
    outs = case.weight[0]
    y = F.conv2d(x, torch.zeros(case.weight))
    upstream = torch.randn_like(F.avg_pool2d(y, case.pool) if case.pool else y)
    return Problem(x, torch.randn(case.weight), torch.rand(outs) + 0.5, torch.randn(outs), upstream)


def by_kernel(
    given: Problem, activation: str | None, pool: int | None, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Output and gradients of weight, γ and β."""
    x, weight, gamma, beta, upstream = given
    layers = stem.Stem(x, weight, gamma, beta, Epilogue(activation, pool), EPS)
    found = stem.statistics(layers)
    return [stem.forward(layers, found, dtype), *stem.backward(upstream.to(dtype), layers, found)]


def statistics(given: Problem) -> stem.Statistics:
    return stem.statistics(stem.Stem(given.x, given.weight, None, None, eps=EPS))


def by_torch(given: Problem, activation: str | None, pool: int | None, dtype: torch.dtype) -> list[Tensor]:
    """The same behind torch's convolution: by the reference in float64, else by torch's operators."""
    x, weight, gamma, beta, upstream = (t.to(dtype) for t in given)
    leaves = [t.requires_grad_() for t in (weight, gamma, beta)]
    call = Call(F.conv2d(x, leaves[0]), *leaves[1:], None, Epilogue(activation, pool), EPS)
    out = oracle.batch_norm(call) if dtype is torch.float64 else oracle.torch_batch_norm(call)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


def assert_as_good(ours: list[Tensor], theirs: list[Tensor], truth: list[Tensor], unit: float = 2e-6) -> None:
    """Our error is at most twice torch's, plus a few roundings of the largest value."""
    for our, their, true in zip(ours, theirs, truth, strict=True):
        oracle.assert_within(our, true, their, floor=unit)


@pytest.mark.parametrize("case", CASES)
def test_statistics_are_those_of_the_output(case: Case) -> None:
    given = problem(case)
    found = statistics(given)
    y = F.conv2d(given.x.double(), given.weight.double())
    mean, var, invstd = _truth(y)
    torch.testing.assert_close(found.mean.double(), mean, rtol=2e-7, atol=2e-7)
    torch.testing.assert_close(found.var.double(), var, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(found.invstd.double(), invstd, rtol=1e-6, atol=0)


def _truth(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = oracle.statistics(y)
    return mean, var, (var + EPS).rsqrt()


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(case: Case, activation: str | None) -> None:
    given = problem(case)
    ours = by_kernel(given, activation, case.pool)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    tail = (activation, case.pool)
    assert_as_good(ours, by_torch(given, *tail, torch.float32), by_torch(given, *tail, torch.float64))


@pytest.mark.parametrize(  # each is three kernels to compile; relu is above
    "activation", [pytest.param(a, marks=[pytest.mark.slow] * (a != "silu")) for a in ACTIVATIONS]
)
@pytest.mark.parametrize("pool", [2, None])
def test_every_activation(activation: str, pool: int | None) -> None:
    given = problem(Case((3, 1, 14, 13), (20, 1, 3, 3), pool))
    theirs, truth = (by_torch(given, activation, pool, dtype) for dtype in (torch.float32, torch.float64))
    assert_as_good(by_kernel(given, activation, pool), theirs, truth)


@pytest.mark.parametrize("case", CASES[:4])
def test_bfloat16_is_rounded_once(case: Case) -> None:
    given = problem(case)
    given = given._replace(upstream=given.upstream.bfloat16().float())
    ours, exact = (by_kernel(given, "relu", case.pool, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert ours[0].dtype is torch.bfloat16
    assert torch.equal(ours[0], exact[0].bfloat16())
    for our, their in zip(ours[1:], exact[1:], strict=True):
        assert torch.equal(our, their)


@pytest.mark.parametrize(("mean", "std"), [(1e4, 1e-2), (-300.0, 1e-3), (0.0, 1e-6)])
def test_means_far_from_the_spread(mean: float, std: float) -> None:
    case = CASES[0]._replace(images=(8, 1, 28, 28))
    given = problem(case, mean=mean, std=std)
    found = statistics(given)
    _, var, _ = _truth(F.conv2d(given.x.double(), given.weight.double()))
    torch.testing.assert_close(found.var.double(), var, rtol=1e-5, atol=0)
    theirs, truth = (by_torch(given, "relu", 2, dtype) for dtype in (torch.float32, torch.float64))
    assert_as_good(by_kernel(given, "relu", 2)[:1], theirs[:1], truth[:1])


def test_constant_images_have_no_variance() -> None:
    given = problem(CASES[0], mean=3.25, std=0.0)
    found = statistics(given)
    assert not found.var.any()
    assert all(t.isfinite().all() for t in by_kernel(given, "relu", 2))


def test_a_value_that_is_not_finite_shows() -> None:
    given = problem(CASES[0])
    given.x[5, 0, 7, 9] = torch.nan
    assert statistics(given).var.isnan().all()


@pytest.mark.parametrize("case", CASES[:4])
def test_the_number_of_threads_changes_no_more_than_a_rounding(case: Case) -> None:
    given, before, found = problem(case), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            found.append(by_kernel(given, "relu", case.pool))
    finally:
        torch.set_num_threads(before)
    for one, two, again, three in zip(*found, strict=True):
        assert torch.equal(two, again)
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one, three, rtol=1e-5, atol=1e-5)


def test_given_statistics_are_used() -> None:
    given = problem(CASES[0])
    mean, var = torch.randn(20), torch.rand(20) + 0.5
    layers = stem.Stem(given.x, given.weight, given.gamma, given.beta, Epilogue("relu", 2), EPS)
    out = stem.forward(layers, stem.Statistics(mean, (var + EPS).rsqrt()), torch.float32)
    y = F.conv2d(given.x, given.weight)
    expected = F.avg_pool2d(F.batch_norm(y, mean, var, given.gamma, given.beta, False, 0.0, EPS).relu(), 2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_what_it_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    images, weight = (2, 1, 28, 28), (20, 1, 3, 3)
    assert stem.unsupported(images, weight, Epilogue("relu", 2)) is None
    assert "values" in str(stem.unsupported((2, 33, 28, 28), (20, 33, 1, 1), NOTHING))
    assert "channels" in str(stem.unsupported(images, (65, 1, 3, 3), NOTHING))
    assert "fit" in str(stem.unsupported((2, 2, 28, 28), weight, NOTHING))
    assert "fit" in str(stem.unsupported((0, 1, 28, 28), weight, NOTHING))
    assert "fit" in str(stem.unsupported((2, 1, 2, 28), weight, NOTHING))
    assert "narrower" in str(stem.unsupported((2, 1, 28, 10), weight, NOTHING))
    assert "narrower" in str(stem.unsupported((2, 1, 3, 28), weight, Epilogue(None, 2)))
    assert "activation" in str(stem.unsupported(images, weight, Epilogue("nonsense", None)))
    assert "pooling" in str(stem.unsupported(images, weight, Epilogue(None, 3)))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert "AVX-512" in str(stem.unsupported(images, weight, Epilogue("relu", 2)))
