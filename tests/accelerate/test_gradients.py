"""The quick layers against ``torch.nn``'s own, in float64 where a truth is needed."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gammabeta.accelerate.gradients import Case, Convolution, quick_layers, quick_weight, wasteful
from gammabeta.kernels.conv.gradients import unsupported, unsupported_weight

CONVOLUTIONS: list[tuple[Callable[[], nn.Conv2d], tuple[int, ...]]] = [
    (lambda: nn.Conv2d(20, 50, 5), (8, 20, 13, 13)),
    (lambda: nn.Conv2d(20, 50, 5, bias=False), (3, 20, 13, 13)),
    (lambda: nn.Conv2d(6, 16, 5), (2, 6, 14, 14)),
    (lambda: nn.Conv2d(3, 5, 3, padding=1), (2, 3, 8, 9)),
    (lambda: nn.Conv2d(5, 4, (1, 3), padding=(0, 1)), (4, 5, 3, 3)),
    (lambda: nn.Conv2d(20, 50, 5), (128, 20, 13, 13)),
]


def gradients(
    layer: nn.Module, x: Tensor, upstream: Tensor, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """The output and the gradients of the input and the parameters, under autocast to ``dtype`` if given."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        out = layer(x)
    found = torch.autograd.grad(out, [x, *layer.parameters()], upstream.to(out.dtype))
    return [out.detach(), *found]


def compare(layer: nn.Module, x: Tensor, dtype: torch.dtype | None) -> None:
    """Our error against float64 is at most twice torch's, plus a few units of rounding."""
    truth_layer = copy.deepcopy(layer).double()
    upstream = torch.randn_like(truth_layer(x.double())).to(dtype or torch.float32).float()
    truth = gradients(truth_layer, x.double(), upstream.double())
    theirs = gradients(layer, x, upstream, dtype)
    with quick_layers(layer):
        ours = gradients(layer, x, upstream, dtype)
    unit = 2.0**-8 if dtype else 2.0**-22
    for our, their, true in zip(ours, theirs, truth, strict=True):
        assert our.dtype is their.dtype
        assert our.shape == their.shape
        limit = 2 * (their - true).abs().max() + unit * true.abs().max()
        assert (our - true).abs().max() <= limit


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("case", range(len(CONVOLUTIONS)))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolutions_have_torchs_gradients(
    case: int, dtype: torch.dtype | None, memory_format: torch.memory_format
) -> None:
    make, shape = CONVOLUTIONS[case]
    compare(
        make().to(memory_format=memory_format),
        torch.randn(shape).contiguous(memory_format=memory_format),
        dtype,
    )


SECOND = (torch.Size((64, 20, 13, 13)), torch.Size((50, 20, 5, 5)))  # the notebook's second convolution
has_kernel = pytest.mark.skipif(
    unsupported(torch.float32, 50, 81) is not None, reason="the kernel is for processors with AVX-512"
)


@has_kernel
def test_the_quick_way_is_taken_for_the_notebooks_second_convolution() -> None:
    layer = CONVOLUTIONS[0][0]()
    x = torch.randn(CONVOLUTIONS[0][1], requires_grad=True)
    with quick_layers(layer):
        assert type(layer) is Convolution
        assert "_Convolve" in type(layer(x).grad_fn).__name__
    assert type(layer) is nn.Conv2d


@has_kernel
def test_a_convolution_that_wastes_nothing_is_left_to_the_library() -> None:
    def asked(images: tuple[int, ...], weight: tuple[int, ...], pad: int, dtype: torch.dtype) -> bool:
        return wasteful(Case(torch.Size(images), torch.Size(weight), (pad, pad), dtype))

    assert asked(*SECOND, 0, torch.float32)
    assert not asked(*SECOND, 0, torch.float64)
    assert not asked((64, 32, 13, 13), (50, 32, 3, 3), 1, torch.float32)  # as many pixels out as in
    assert not asked((0, 20, 13, 13), (50, 20, 5, 5), 0, torch.float32)
    assert not asked((64, 20, 4, 4), (50, 20, 5, 5), 0, torch.float32)  # nothing comes out
    assert not asked((64, 20, 6, 6), (50, 20, 5, 5), 0, torch.float32)  # fewer pixels than a tile
    assert not asked((64, 20, 13, 13), (51, 20, 5, 5), 0, torch.bfloat16)  # no pairs


@pytest.mark.skipif(unsupported_weight() is not None, reason="the kernel needs AVX-512 BF16")
def test_our_weight_gradient_is_for_bfloat16_and_whole_blocks() -> None:
    def asked(images: tuple[int, ...], weight: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> bool:
        return quick_weight(Case(torch.Size(images), torch.Size(weight), (0, 0), dtype))

    assert asked(*SECOND)
    assert not asked(*SECOND, torch.float32)
    assert asked((64, 20, 13, 13), (128, 20, 5, 5))
    assert not asked((64, 20, 13, 13), (80, 20, 5, 5))  # two blocks of 64
    assert not asked((64, 256, 13, 13), (256, 256, 3, 3))  # a table beyond the cache
    assert not asked((0, 20, 13, 13), (50, 20, 5, 5))
    assert not asked((64, 20, 4, 4), (50, 20, 5, 5))


@pytest.mark.skipif(unsupported_weight() is not None, reason="the kernel needs AVX-512 BF16")
def test_a_first_convolution_has_the_quick_weight_gradient() -> None:
    layer, x = nn.Conv2d(20, 50, 5), torch.randn(4, 20, 13, 13)
    with quick_layers(layer), torch.autocast("cpu", torch.bfloat16):
        assert "_Convolve" in type(layer(x).grad_fn).__name__
        layer.requires_grad_(False)
        assert layer(x).grad_fn is None


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_second_derivatives_are_torchs(dtype: torch.dtype | None) -> None:
    layer = nn.Conv2d(6, 4, 3)
    x = torch.randn(2, 6, 5, 5, requires_grad=True)

    def penalty() -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            out = layer(x)
        (dx,) = torch.autograd.grad(out.float().square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [layer.weight, x])

    theirs = penalty()
    with quick_layers(layer):
        ours = penalty()
    for our, their in zip(ours, theirs, strict=True):
        scale = float(their.abs().max())
        torch.testing.assert_close(our, their, rtol=0, atol=scale * (2e-2 if dtype else 1e-5))


class Doubling(nn.Conv2d):
    """A layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Twice the usual."""
        return 2 * super().forward(x)


def test_only_plain_layers_change_and_all_come_back() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, groups=2),
        Doubling(3, 3, 3),
        nn.Conv2d(3, 3, 3),
    )
    model[5].forward = lambda x: x  # type: ignore[method-assign]
    kinds = [type(module) for module in model]
    with quick_layers(model):
        assert [type(module) for module in model] == kinds
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4))

    def fail() -> None:
        with quick_layers(plain):
            assert [type(module) for module in plain] == [Convolution, nn.Linear]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [type(module) for module in plain] == [nn.Conv2d, nn.Linear]


def test_what_is_not_plain_execution_is_left_to_torch() -> None:
    layer = nn.Conv2d(20, 50, 5)
    x = torch.randn(2, 20, 13, 13)
    with quick_layers(layer):
        weight = layer.weight.detach()
        _, found = torch.func.vjp(lambda w: torch.func.functional_call(layer, {"weight": w}, (x,)), weight)
        assert found(torch.ones(2, 50, 9, 9))[0].shape == weight.shape
        with torch.no_grad():
            assert torch.equal(layer(x), nn.Conv2d.forward(layer, x))
        assert layer(x[:0].requires_grad_()).shape == (0, 50, 9, 9)
        assert layer(x[0].requires_grad_()).shape == (50, 9, 9)
        with pytest.raises(RuntimeError, match="channels"):
            layer(torch.randn(2, 3, 13, 13, requires_grad=True))
