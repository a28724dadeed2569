"""Shapes, layouts, storage types and options of the CPU kernels that the main comparison does not reach."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import gammabeta as gb
from gammabeta.epilogue import NOTHING, Epilogue, MaxPool
from gammabeta.kernels.backend import Call, Normalized, Running, unfit
from gammabeta.kernels.cpu import allocator, host
from tests import oracle

EPS = 1e-5
RELU = Epilogue("relu")
SHAPES = {
    "(N, C)": (7, 33),
    "one image": (1, 16, 40),
    "one channel": (5, 1, 6, 7),
    "one pixel": (9, 10, 1, 1),
    "1d": (3, 20, 41),
    "3d": (2, 6, 3, 4, 5),
    "odd channels": (2, 67, 5, 3),
    "long plane": (1, 2, 90, 100),
    "pieces": (2, 3, 17000),
}


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def poison(monkeypatch) -> None:
    """Every fresh tensor is NaN, so that a value nobody wrote shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(*args, **kwargs) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(255)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x: empty_like(x).fill_(float("nan")))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_in_both_layouts_with_poisoned_memory(name, affine, monkeypatch):
    shape = SHAPES[name]
    x, grad = torch.randn(shape) + 1, torch.randn(shape)
    weight, bias = (torch.randn(shape[1]), torch.randn(shape[1])) if affine else (None, None)
    call = Call(x, weight, bias, None, RELU, EPS)
    exact = oracle.truth(call, grad)
    poison(monkeypatch)
    for arranged in (x, channels_last(x)):
        found, _ = oracle.by_kernels(host, call._replace(x=arranged), grad)
        torch.testing.assert_close(found.out.double(), exact.out, rtol=1e-5, atol=1e-5)
        for ours, true in zip(found[1:], exact[1:], strict=True):
            if true is not None:
                torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=2e-5)
        assert found.dresidual is None
        assert found.out.stride() == arranged.stride()
        assert found.dx.stride() == arranged.stride()


@pytest.mark.parametrize("last", [False, True])
def test_bfloat16_is_stored_rounded_and_computed_in_float32(last):
    x = (torch.randn(4, 20, 9, 11) * 3 + 5).bfloat16()
    x = channels_last(x) if last else x
    grad = torch.randn(x.shape).bfloat16()
    call = Call(x, None, None, None, RELU, EPS)
    out, mean, var, invstd = host.forward_train(call)
    true_mean, true_var = oracle.statistics(x)
    torch.testing.assert_close(mean.double(), true_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), true_var, rtol=1e-6, atol=0)
    single = host.forward_train(call._replace(x=x.float()))[0]
    assert torch.equal(out, single.bfloat16())
    dx = host.backward(grad, Normalized(call, mean, invstd), False)[0]
    torch.testing.assert_close(dx.double(), oracle.truth(call, grad).dx, rtol=2**-8, atol=1e-5)


def test_bfloat16_keeps_nan_and_infinity():
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 3.0e38]]).bfloat16().expand(2, 4).clone()
    one, zero = torch.ones(4), torch.zeros(4)
    out = host.forward(Normalized(Call(x, None, None, None, RELU, 0.0), zero, one))
    torch.testing.assert_close(out, F.relu(x), equal_nan=True)


def test_inputs_without_a_layout_of_their_own():
    base = torch.randn(6, 8, 10, 12)
    grad = torch.randn(3, 8, 5, 12)
    for x in (
        base[::2, :, ::2],
        base[::2, :, 1::2].transpose(2, 3).transpose(2, 3),
        base[:1, :, :5].expand(3, 8, 5, 12),
    ):
        call = Call(x, None, None, None, RELU, EPS)
        spread = grad[:, :, :, :1].expand(3, 8, 5, 12)  # what sum() hands back
        found, _ = oracle.by_kernels(host, call, spread)
        exact = oracle.truth(call, spread)
        torch.testing.assert_close(found.out.double(), exact.out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.dx.double(), exact.dx, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "residual", "pool", "reason"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), None, None, "float64"),
        (torch.zeros(2, 3, dtype=torch.float16), None, None, "float16"),
        (torch.zeros(2, 3).to_sparse(), None, None, "sparse"),
        (torch.zeros(0, 3), None, None, "empty"),
        (torch.zeros(2, 0), None, None, "empty"),
        (torch.zeros(2, 3, 0, 4), None, None, "empty"),
        (torch.zeros(3), None, None, "no channels"),
        (torch.zeros(2, 3, device="meta"), None, None, "meta"),
        (torch.zeros(2, 3), None, 2, "four dimensions"),
        (torch.zeros(2, 3, 4), None, 2, "four dimensions"),
        (torch.zeros(2, 3, 4, 5, 6), None, 2, "four dimensions"),
        (torch.zeros(2, 3, 4), None, MaxPool(2, 2), "four dimensions"),
        (torch.zeros(2, 3, 1, 4), None, 2, "smaller than"),
        (torch.zeros(2, 3, 6, 6), None, 3, "mean over 2x2"),
        (torch.zeros(2, 3), torch.zeros(1, 3), None, "shape"),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64), None, "dtype"),
        (torch.zeros(2, 3), torch.zeros(2, 3, device="meta"), None, "device"),
        (torch.zeros(2, 3), 1.0, None, "a number"),
    ],
)
def test_what_no_kernel_takes_is_said(x, residual, pool, reason):
    assert reason in (unfit(x, residual, pool) or host.unsupported(x, residual, Epilogue(None, pool)))


def test_an_activation_without_arithmetic_is_refused_when_its_kernel_is_compiled():
    """``epilogue_of`` refuses the name before; no kernel may pass it over if it does arrive."""
    call = Call(torch.zeros(2, 3), None, None, None, Epilogue("nonsense"), EPS)
    with pytest.raises(gb.errors.UsageError, match="nonsense"):
        host.forward_train(call)


def test_what_the_kernels_take():
    x, residual = torch.zeros(2, 3, 4, 5), torch.ones(2, 3, 4, 5)
    assert unfit(x, residual, 2) is None
    assert host.unsupported(x, residual, Epilogue("gelu", 2)) is None
    assert host.unsupported(torch.zeros(2, 3), None, NOTHING) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_statistics_move_as_torchs_do(dtype):
    x = torch.randn(5, 6, 7) * 3 + 2
    ours = [torch.randn(6).to(dtype), torch.rand(6).to(dtype)]
    theirs = [t.clone() for t in ours]
    F.batch_norm(x.to(dtype), *theirs, None, None, True, 0.3)
    mean, var = host.statistics(x)
    assert host.update_running(Running(*ours, 0.3, True), mean, var, 35)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_statistics_refuse_what_is_not_finite(dtype):
    bad = torch.tensor([1.0, float("nan")])
    running = [torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype)]
    careful = Running(*running, 0.1, True)
    assert not host.update_running(careful, bad, torch.ones(2), 10)
    assert not host.update_running(careful, torch.ones(2), bad * float("inf"), 10)
    assert running[0].tolist() == [0.0, 0.0]
    assert running[1].tolist() == [1.0, 1.0]
    assert host.update_running(careful._replace(skip_nonfinite=False), bad, torch.ones(2), 10)
    assert running[0].isnan().tolist() == [False, True]


def test_large_output_is_an_ordinary_tensor():
    x = torch.zeros(3, 700, 601)[:, ::2]
    made = allocator.empty_like(x)
    assert made.shape == x.shape
    assert made.numel() * 4 < allocator._LARGE
    large = allocator.empty_like(torch.zeros(2, 3, 1000, 1001, dtype=torch.bfloat16))
    assert large.fill_(1).sum(dtype=torch.float64).item() == large.numel()
