"""The kernels of a convolution's gradients, against float64."""

import pytest
import torch

from gammabeta.kernels.conv.gradients import input_gradient, unsupported, unsupported_weight, weight_gradient

SHAPES = [  # images (N, C, H, W), output channels, kernel, padding
    ((3, 20, 13, 13), 50, (5, 5), (0, 0)),
    ((2, 1, 4, 7), 2, (3, 2), (0, 0)),
    ((1, 70, 5, 5), 4, (1, 1), (0, 0)),
    ((5, 7, 6, 5), 6, (3, 3), (1, 2)),
    ((2, 3, 3, 2), 8, (3, 3), (1, 1)),
    ((1, 16, 3, 14), 12, (3, 9), (0, 0)),
    ((1, 5, 9, 8), 2, (2, 1), (0, 0)),  # 64 pixels out: groups of 24, 24 and 16
    ((4, 2, 6, 7), 2, (2, 2), (0, 0)),  # 30: the last group has fewer pixels than two tiles
    ((1, 2, 1, 27), 2, (1, 1), (0, 0)),  # 27: the last tile reaches back into the group before
]


def gradient(
    grad: torch.Tensor, weight: torch.Tensor, shape: tuple[int, ...], padding: tuple[int, int]
) -> torch.Tensor:
    return torch.nn.grad.conv2d_input(shape, weight, grad, padding=padding)


@pytest.mark.skipif(unsupported(torch.float32, 2, 6) is not None, reason="needs AVX-512")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "outs", "kernel", "padding"), SHAPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_gradients_are_as_good_as_torchs(
    shape: tuple[int, int, int, int],
    outs: int,
    kernel: tuple[int, int],
    padding: tuple[int, int],
    dtype: torch.dtype,
    threads: int,
) -> None:
    count, channels, height, width = shape
    out = (height + 2 * padding[0] - kernel[0] + 1, width + 2 * padding[1] - kernel[1] + 1)
    if unsupported(dtype, outs, out[0] * out[1]) is not None:
        pytest.skip("no bfloat16 products here")
    grad, weight = torch.randn(count, outs, *out).to(dtype), torch.randn(outs, channels, *kernel).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = input_gradient(grad, weight, shape, padding)
    finally:
        torch.set_num_threads(before)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    truth = gradient(grad.double(), weight.double(), shape, padding)
    terms = gradient(grad.double().abs(), weight.double().abs(), shape, padding)
    unit = 2.0**-24 * (outs + kernel[0] * kernel[1]) + (2.0**-8 if dtype is torch.bfloat16 else 0.0)
    assert ((ours.double() - truth).abs() <= unit * terms).all()
    last = input_gradient(grad.contiguous(memory_format=torch.channels_last), weight, shape, padding)
    assert torch.equal(last, ours)  # whatever the layout and the number of threads


@pytest.mark.skipif(unsupported_weight() is not None, reason="needs AVX-512 BF16")
@pytest.mark.parametrize(
    ("shape", "outs", "kernel", "padding"),
    [
        *SHAPES,
        ((3, 2, 12, 11), 20, (3, 3), (1, 1)),  # more pixels than are laid out at a time; an image left over
        ((4, 3, 6, 6), 40, (3, 3), (0, 0)),  # three vectors of channels
        ((2, 3, 5, 5), 130, (2, 2), (0, 1)),  # three blocks of channels
        ((1, 1, 3, 3), 1, (3, 3), (0, 0)),
    ],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_weight_gradients_add_exact_products(
    shape: tuple[int, int, int, int],
    outs: int,
    kernel: tuple[int, int],
    padding: tuple[int, int],
    threads: int,
) -> None:
    count, _, height, width = shape
    out = (height + 2 * padding[0] - kernel[0] + 1, width + 2 * padding[1] - kernel[1] + 1)
    grad, x = torch.randn(count, outs, *out).bfloat16(), torch.randn(shape).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = weight_gradient(grad, x, kernel, padding)
        last = weight_gradient(
            grad.contiguous(memory_format=torch.channels_last), x.contiguous(), kernel, padding
        )
    finally:
        torch.set_num_threads(before)
    size = (outs, shape[1], *kernel)
    truth = torch.nn.grad.conv2d_weight(x.double(), size, grad.double(), padding=padding)
    terms = torch.nn.grad.conv2d_weight(x.double().abs(), size, grad.double().abs(), padding=padding)
    assert ours.shape == size
    assert ours.dtype is torch.float32
    assert ((ours - truth).abs() <= 2.0**-24 * (count * out[0] * out[1] + 2) * terms).all()
    assert torch.equal(ours, last)  # whatever the layout


def test_what_it_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert "AVX-512" in str(unsupported(torch.float32, 2, 6))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert unsupported(torch.float32, 1, 6) is None
    assert "float64" in str(unsupported(torch.float64, 2, 6))
    assert "tile" in str(unsupported(torch.float32, 2, 5))
    assert "pairs" in str(unsupported(torch.bfloat16, 3, 6))
