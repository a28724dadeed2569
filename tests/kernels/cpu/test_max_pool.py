"""Max pooling in the kernels: against the reference in float64, and torch's choice among equals."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gammabeta.epilogue import Epilogue, MaxPool, pooled_shape
from gammabeta.kernels.backend import Call, Normalized
from gammabeta.kernels.cpu import host
from tests import oracle

EPS = 1e-5
LAYOUTS = (torch.contiguous_format, torch.channels_last)
RESNET = MaxPool(3, 2, 1)
# Strides 1 and 2 go by vectors, others by single values; windows that overlap, touch, and leave gaps.
OTHERS = [MaxPool(2, 2), MaxPool(3, 1, 1), MaxPool(2, 3, 1), MaxPool(1, 1), MaxPool(3, 3), MaxPool(5, 2, 2)]
OTHERS += [MaxPool(4, 4, 2), MaxPool(16, 7, 8)]
SHAPES = [(3, 20, 17, 23), (2, 64, 9, 16), (3, 1, 16, 40), (5, 3, 16, 16)]


def norm(t: Tensor) -> float:
    return float(t.double().norm())


def compare(shape, window, form, activation="relu", with_residual=False, dtype=torch.float32):
    torch.manual_seed(0)
    x = (torch.randn(shape) * 2 + 0.3).to(dtype).contiguous(memory_format=form)
    residual = torch.randn(shape).to(dtype).contiguous(memory_format=form) if with_residual else None
    call = Call(
        x, torch.rand(shape[1]) + 0.5, torch.randn(shape[1]), residual, Epilogue(activation, window), EPS
    )
    grad = torch.randn(pooled_shape(shape, window)).to(dtype).contiguous(memory_format=form)
    exact = oracle.truth(call, grad)
    found, given = oracle.by_kernels(host, call, grad)
    count = x.numel() // x.shape[1]

    def check(ours, true, least=0.0):
        bound = 1e-5 if dtype == torch.float32 else 6e-2
        oracle.assert_within(ours, true, floor=bound, scale=max(norm(true), least), size=norm)

    def check_sum(ours, true):
        """Of n terms of about one, whose rounding does not get smaller when they cancel: of √n at least."""
        check(ours, true, count**0.5)

    def check_large(out, dx, dresidual):
        check(out, exact.out)
        check(dx, exact.dx)
        assert (dresidual is None) is not with_residual
        if dresidual is not None:
            check(dresidual, exact.dresidual)

    check_large(found.out, found.dx, found.dresidual)
    check_sum(found.dweight, exact.dweight)
    check_sum(found.dbias, exact.dbias)
    again = host.forward(given._replace(codes=None))
    assert torch.equal(again, found.out), "without codes, from the statistics"
    sum_dz, sum_dz_xhat = host.backward_reduce(grad, given)
    check_sum(sum_dz, exact.dbias)
    check_sum(sum_dz_xhat, exact.dweight)
    check_large(
        again, *host.backward_apply(grad, given, (sum_dz / count, sum_dz_xhat / count), with_residual)
    )


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
    call = Call(x, None, None, None, Epilogue(None, window), EPS)
    out = host.forward(Normalized(call, torch.zeros(20), torch.ones(20), codes))
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
            call = Call(x.contiguous(memory_format=form), None, None, None, Epilogue("relu", RESNET), EPS)
            found.append(host.forward(Normalized(call, mean, invstd)))
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
        assert words in host.unsupported(given[0], None, Epilogue(None, given[1]))
    assert host.unsupported(x, None, Epilogue(None, MaxPool(16, 1, 8))) is None
