"""Convolutions from weights laid out beforehand: any sizes, any strides of the input, any threads."""

import pytest
import torch
from torch.nn import functional as F

from gammabeta.epilogue import ACTIVATIONS, Epilogue
from gammabeta.kernels.conv import serving

pytestmark = pytest.mark.skipif(bool(serving.unsupported(None)), reason=str(serving.unsupported(None)))

QUICK = (None, "relu", "silu")


def _serve(
    x,
    weight,
    bias=None,
    stride=(1, 1),
    dilation=(1, 1),
    padding=(0, 0),
    activation=None,
    pool=False,
    threads=2,
):
    layer = serving.Layer(tuple(weight.shape), padding, stride, dilation, activation, pool)
    plan = serving.plan_of(x.shape, x.stride(), layer, threads)
    return serving.convolve(x, serving.lay_out(weight), bias, plan)


def _reference(
    x, weight, bias=None, stride=(1, 1), dilation=(1, 1), padding=(0, 0), activation=None, pool=False
):
    bias = None if bias is None else bias.double()
    z = F.conv2d(x.double(), weight.double(), bias, stride, padding, dilation)
    return Epilogue(activation, 2 if pool else None).apply(z)


def _assert_close(found, wanted, terms):
    """One rounding of float32 for each term of a sum, at most; the size is that of the largest."""
    assert found.shape == wanted.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found - wanted).abs().max() <= 2**-24 * (terms + 8) * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize(  # each is a kernel to compile; its arithmetic is that of tests/kernels/cpu
    "activation",
    [
        pytest.param(a, marks=[pytest.mark.slow] * (a not in (None, "relu", "silu")))
        for a in (None, *ACTIVATIONS)
    ],
)
def test_every_activation(activation, pool):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 9, 8), torch.randn(5, 3, 3, 2), torch.randn(5)
    options = {"activation": activation, "pool": pool}
    _assert_close(_serve(x, weight, bias, **options), _reference(x, weight, bias, **options), 18)


@pytest.mark.parametrize("outs", [1, 16, 17, 33, 50, 64, 65, 130])
@pytest.mark.parametrize("images", [1, 3])
def test_every_number_of_channels(outs, images):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(images, 2, 7, 9), torch.randn(outs, 2, 3, 3), torch.randn(outs)
    _assert_close(_serve(x, weight, bias), _reference(x, weight, bias), 18)


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("size", [(3, 3), (4, 4), (3, 40), (40, 4), (33, 29)])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": (2, 3)}, {"dilation": (1, 2)}, {"stride": (2, 1), "dilation": (2, 2)}],
    ids=str,
)
def test_sizes_strides_and_layouts(size, options, pool, monkeypatch):
    monkeypatch.setattr(serving, "_BAND", 4 * 16 * 100)  # bands of a few rows
    serving.plan_of.cache_clear()
    torch.manual_seed(0)
    base = torch.randn(2, 4, 2 * size[0] + 6, 2 * size[1] + 6)
    weight = torch.randn(4, 4, 2, 2)
    for x in (
        base,
        base.contiguous(memory_format=torch.channels_last),
        base[:, :, ::2, 1::2],
        base[:1].expand(3, -1, -1, -1),
        base.transpose(2, 3),
        base.flip(0)[1:],
    ):
        options = {**options, "pool": pool}
        _assert_close(_serve(x, weight, **options), _reference(x, weight, **options), 16)
    serving.plan_of.cache_clear()


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("size", [(3, 2), (4, 9), (33, 29)])
@pytest.mark.parametrize("channels", [1, 3, 16])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": (1, 1)},
        {"padding": (0, 2)},
        {"padding": (3, 0), "stride": (2, 1)},
        {"padding": (2, 2), "stride": (3, 3)},
        {"padding": (2, 1), "dilation": (2, 1)},
    ],
    ids=str,
)
def test_zeros_around_the_image(size, channels, options, pool, monkeypatch):
    monkeypatch.setattr(serving, "_BAND", 4 * 16 * 100)
    serving.plan_of.cache_clear()
    torch.manual_seed(0)
    x = torch.randn(3, channels, *size).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(4, channels, 3, 2), torch.randn(4)
    wanted = F.conv2d(
        x, weight, bias, options.get("stride", 1), options["padding"], options.get("dilation", 1)
    )
    options = {**options, "pool": pool and min(wanted.shape[2:]) > 1}
    _assert_close(_serve(x, weight, bias, **options), _reference(x, weight, bias, **options), 6 * channels)
    serving.plan_of.cache_clear()


def test_the_number_of_threads_changes_nothing():
    x, weight = torch.randn(3, 5, 11, 10), torch.randn(20, 5, 3, 3)
    found = [_serve(x, weight, threads=threads) for threads in (1, 2, 3, 16)]
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_values_that_are_not_finite_reach_what_they_should():
    x, weight = torch.randn(1, 1, 6, 6), torch.randn(3, 1, 3, 3)
    x[0, 0, 0, 0] = float("nan")
    found = _serve(x, weight, activation="relu")
    assert found[:, :, 0, 0].isnan().all()
    assert found.isnan().sum() == 3
    x[0, 0, 0, 0] = float("inf")
    found = _serve(x, weight.abs())
    assert found[:, :, 0, 0].isinf().all()
    assert found.isfinite().sum() == found.numel() - 3


def test_there_is_no_kernel_for_other_activations():
    assert serving.unsupported("nonsense") == "no kernel has the activation 'nonsense'"
