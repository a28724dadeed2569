"""Max pooling in the kernels: torch's own operations in float64, and torch's choice among equals."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gammabeta.epilogue import MaxPool
from gammabeta.kernels.cpu import host

EPS = 1e-5
LAYOUTS = (torch.contiguous_format, torch.channels_last)
RESNET = MaxPool(3, 2, 1)
# Strides 1 and 2 go by vectors, others by single values; windows that overlap, touch, and leave gaps.
OTHERS = [MaxPool(2, 2), MaxPool(3, 1, 1), MaxPool(2, 3, 1), MaxPool(1, 1), MaxPool(3, 3), MaxPool(5, 2, 2)]
OTHERS += [MaxPool(4, 4, 2), MaxPool(16, 7, 8)]
SHAPES = [(3, 20, 17, 23), (2, 64, 9, 16), (3, 1, 16, 40), (5, 3, 16, 16)]


def error(found: Tensor, exact: Tensor) -> float:
    """Of the norm."""
    return float((found.double() - exact).norm() / max(float(exact.norm()), 1e-12))


def error_of_sums(found: Tensor, exact: Tensor, count: int) -> float:
    """Of n terms of about one, whose rounding does not get smaller when they cancel: of √n at least."""
    return float((found.double() - exact).norm() / max(float(exact.norm()), count**0.5))


def compare(shape, window, form, activation="relu", with_residual=False, dtype=torch.float32):
    torch.manual_seed(0)
    x = (torch.randn(shape) * 2 + 0.3).to(dtype).contiguous(memory_format=form)
    residual = torch.randn(shape).to(dtype).contiguous(memory_format=form) if with_residual else None
    weight, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    leaves = [t.double().requires_grad_() for t in (x, weight, bias, residual) if t is not None]
    z = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], True, 0.0, EPS)
    z = z + leaves[3] if with_residual else z
    exact = F.max_pool2d(getattr(F, activation)(z) if activation else z, *window)
    grad = torch.randn(exact.shape).to(dtype).contiguous(memory_format=form)
    expected = torch.autograd.grad(exact, leaves, grad.double())

    codes = host.codes_of(x, window)
    options = (weight, bias, residual)
    out, mean, _, invstd = host.forward_train(x, *options, EPS, activation, window, codes)
    bound = 1e-5 if dtype == torch.float32 else 6e-2
    assert error(out, exact.detach()) < bound
    given = (x, mean, invstd, *options, activation, window)
    assert torch.equal(host.forward(*given), out), "without codes, from the statistics"
    dx, dweight, dbias, dresidual = host.backward(grad, *given, with_residual, codes)
    count = x.numel() // x.shape[1]
    assert error(dx, expected[0]) < bound
    assert error_of_sums(dweight, expected[1], count) < bound
    assert error_of_sums(dbias, expected[2], count) < bound
    assert dresidual is None or error(dresidual, expected[3]) < bound
    sum_dz, sum_dz_xhat = host.backward_reduce(grad, *given, codes)
    assert error_of_sums(sum_dz, expected[2], count) < bound
    assert error_of_sums(sum_dz_xhat, expected[1], count) < bound
    means = sum_dz / count, sum_dz_xhat / count
    dx, dresidual = host.backward_apply(grad, *given, *means, with_residual, codes)
    assert error(dx, expected[0]) < bound
    assert dresidual is None or error(dresidual, expected[3]) < bound


@pytest.mark.parametrize("form", LAYOUTS)
@pytest.mark.parametrize("window", [RESNET, *(pytest.param(w, marks=pytest.mark.slow) for w in OTHERS)])
def test_agrees_with_float64(window, form):
    for shape in SHAPES:
        compare(shape, window, form)


@pytest.mark.parametrize("form", LAYOUTS)
def test_large_inputs_on_several_threads_and_past_the_caches(form):
    compare((8, 64, 80, 82), RESNET, form)


@pytest.mark.parametrize("form", LAYOUTS)
@pytest.mark.parametrize(
    ("activation", "with_residual", "dtype"),
    [
        pytest.param("leaky_relu", True, torch.float32, marks=pytest.mark.slow),
        pytest.param("gelu", True, torch.float32, marks=pytest.mark.slow),
        pytest.param(None, False, torch.float32, marks=pytest.mark.slow),
        pytest.param(None, True, torch.float32, marks=pytest.mark.slow),
        pytest.param("relu", False, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("silu", True, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_what_comes_before_it(form, activation, with_residual, dtype):
    for shape in SHAPES:
        compare(shape, RESNET, form, activation, with_residual, dtype)


def places(codes: Tensor, window: MaxPool, shape: tuple[int, ...]) -> Tensor:
    """What ``return_indices=True`` gives, from the codes."""
    top = torch.arange(codes.shape[2])[:, None] * window.stride - window.padding
    left = torch.arange(codes.shape[3]) * window.stride - window.padding
    rows, columns = codes.long() // window.kernel, codes.long() % window.kernel
    return (top + rows) * shape[3] + left + columns


@pytest.mark.parametrize("form", LAYOUTS)
@pytest.mark.parametrize("window", [RESNET, MaxPool(3, 1, 1), MaxPool(2, 3, 1)])
def test_torchs_choice_among_equals_and_nan(window, form):
    """Few different values, so that most windows hold their greatest several times."""
    torch.manual_seed(0)
    shape = (3, 20, 17, 23)
    x = torch.randint(-2, 3, shape).float()
    x[torch.rand(shape) < 0.05] = float("nan")
    x[torch.rand(shape) < 0.05] = float("inf")
    x = x.contiguous(memory_format=form)
    codes = host.codes_of(x, window)
    same = torch.zeros(20), torch.ones(20), None, None, None
    out = host.forward(x, *same, None, window, codes=codes)
    exact, indices = F.max_pool2d(x, *window, return_indices=True)
    torch.testing.assert_close(out, exact, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(places(codes, window, shape), indices)


def test_the_number_of_threads_changes_no_bit_of_the_output():
    x = torch.randn(4, 32, 40, 40)
    mean, invstd = torch.randn(32), torch.rand(32) + 0.5
    threads, found = torch.get_num_threads(), []
    try:
        for number, form in itertools.product((1, 2, 3), LAYOUTS):
            torch.set_num_threads(number)
            y = x.contiguous(memory_format=form)
            found.append(host.forward(y, mean, invstd, None, None, None, "relu", RESNET))
    finally:
        torch.set_num_threads(threads)
    for out in found[1:]:
        assert torch.equal(out, found[0])


def test_refusals_say_why():
    x = torch.randn(2, 3, 8, 8)
    for words, given in {
        "256": (x, MaxPool(17, 2)),
        "four dimensions": (x[:, :, 0], MaxPool(2, 2)),
        "smaller": (x[:, :, :2], MaxPool(3, 1)),
    }.items():
        assert words in host.unsupported(given[0], None, None, given[1])
    assert host.unsupported(x, None, None, MaxPool(16, 1, 8)) is None
