"""A convolution and the batch norm behind it done in one, against the two of them."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

import gammabeta as gb
from gammabeta.accelerate.stem import StemBatchNorm2d, StemConvolution, one_stem
from gammabeta.epilogue import NOTHING
from gammabeta.kernels.backend import load as kernels
from gammabeta.kernels.conv.stem import unsupported
from gammabeta.train import DigitNetwork

SHAPE = (6, 2, 14, 17)
has_kernel = pytest.mark.skipif(
    isinstance(kernels("cpu"), str) or unsupported(SHAPE, (5, 2, 3, 3), NOTHING) is not None,
    reason="the kernel is for processors with AVX-512",
)


def network(bias: bool = False, padding: int = 0, **settings: Any) -> nn.Sequential:
    """A convolution and a batch norm, no two channels alike."""
    model = nn.Sequential(nn.Conv2d(2, 5, 3, padding=padding, bias=bias), gb.nn.BatchNorm2d(5, **settings))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    if bias:
        model[0].bias.requires_grad_(False)  # type: ignore[union-attr]
    return model


def is_one(out: Tensor) -> bool:
    return out.grad_fn is not None and "_Stem" in out.grad_fn.name()


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The calls of the kernel's forward pass."""
    from gammabeta.kernels.conv import stem

    calls, forward = [], stem.forward

    def note(*args: Any) -> Tensor:
        calls.append(args)
        return forward(*args)

    with monkeypatch.context() as patch:
        patch.setattr(stem, "forward", note)
        yield calls


def results(model: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output, gradients and buffers after a training step, under autocast to ``dtype`` if given."""
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        out = model.train()(x)
    wanted = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(out, wanted, torch.randn(out.shape).to(out.dtype))
    return [out.detach(), *found, *(b.clone() for b in model.buffers())]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"activation": "relu", "pool": 2},
    {"bias": True, "activation": "relu"},
    {"padding": 1, "activation": "silu", "pool": 2},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False, "activation": "relu"},
    {"initialize": "first_batch"},
]


@has_kernel
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_training_step_is_the_two_layers(settings: dict[str, Any], dtype: torch.dtype | None) -> None:
    model, x = network(**settings), torch.randn(SHAPE)
    truth = results(copy.deepcopy(model).double(), x.double())
    theirs = results(copy.deepcopy(model), x, dtype)
    with one_stem(model):
        ours = results(model, x, dtype)
        assert is_one(model(x))
    unit = 2.0**-8 if dtype else 2.0**-21
    for our, their, true in zip(ours, theirs, truth, strict=True):
        assert our.shape == their.shape
        assert our.dtype is their.dtype
        limit = 2 * (their - true).abs().max() + unit * true.abs().max()
        assert (our - true).abs().max() <= limit


@has_kernel
@pytest.mark.parametrize("settings", SETTINGS)
def test_evaluation_is_the_two_layers(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(**settings), torch.randn(SHAPE)
    results(model, x)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        with one_stem(model), counted(monkeypatch) as calls:
            found = model(x)
    assert len(calls) == ("track_running_stats" not in settings)  # without them it is the batch's again
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@has_kernel
def test_second_derivatives_are_the_two_layers() -> None:
    model, x = network(activation="silu", pool=2).double().float(), torch.randn(SHAPE)

    def penalty() -> list[Tensor]:
        found = torch.autograd.grad(model(x).square().sum(), list(model.parameters()), create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in found), list(model.parameters())))

    theirs = penalty()
    with one_stem(model):
        ours = penalty()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-3, atol=1e-4 * float(their.abs().max()))


@has_kernel
def test_frozen_parameters_get_no_gradient() -> None:
    model, x = network(), torch.randn(SHAPE)
    model[1].weight.requires_grad_(False)  # type: ignore[union-attr]
    with one_stem(model):
        model(x).square().sum().backward()
    assert model[1].weight.grad is None
    assert model[0].weight.grad is not None
    assert model[1].bias.grad is not None


def _with_hook(model: nn.Sequential) -> None:
    model[0].register_forward_hook(lambda _module, _inputs, out: out * 2)


def _with_a_backward_pre_hook(model: nn.Sequential) -> None:
    model[1].register_full_backward_pre_hook(lambda _module, _grad: None)


def _with_training_bias(model: nn.Sequential) -> None:
    model[0].bias = nn.Parameter(torch.ones(5))


def _with_wide_patches(model: nn.Sequential) -> None:
    model[0] = nn.Conv2d(2, 5, 5)


def _in_evaluation(model: nn.Sequential) -> None:
    model.eval()


REASONS: list[Callable[[nn.Sequential], None]] = [
    _with_hook,
    _with_a_backward_pre_hook,
    _with_training_bias,
    _with_wide_patches,
    _in_evaluation,
]


@pytest.mark.parametrize("change", REASONS)
@pytest.mark.parametrize("early", [True, False])
def test_what_it_is_not_for_is_done_by_the_two_layers(
    change: Callable[[nn.Sequential], None], early: bool
) -> None:
    model, x = network(), torch.randn(SHAPE)
    if early:
        change(model)
    with one_stem(model):
        if not early:
            change(model)
        out = model(x)
        assert not is_one(out)
    torch.testing.assert_close(out, model(x))


def test_a_hook_on_all_modules_sees_what_the_convolution_gives() -> None:
    seen: list[tuple[int, ...]] = []
    model, x = network(), torch.randn(SHAPE)
    with one_stem(model):
        handle = register_module_forward_hook(lambda _module, _inputs, out: seen.append(tuple(out.shape)))
        try:
            model(x)
        finally:
            handle.remove()
    assert seen == [(6, 5, 12, 15)] * 3


def test_an_input_with_a_gradient_gets_one() -> None:
    model, x = network(), torch.randn(SHAPE, requires_grad=True)
    with one_stem(model):
        model(x).square().sum().backward()
    assert x.grad is not None


@has_kernel
def test_a_converted_model_hands_its_activation_over() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 5, 3, bias=False), nn.BatchNorm2d(5)
            self.fc = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.norm(self.conv(x)).relu()
            return self.fc(h.mean((2, 3)))  # type: ignore[no-any-return]

    model, x = gb.convert(Plain(), to="fused"), torch.randn(SHAPE)
    expected = model(x)
    with one_stem(model):
        assert type(model.norm) is StemBatchNorm2d
        found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_notebooks_network_and_all_comes_back() -> None:
    model = DigitNetwork()
    before, state = {name: type(m) for name, m in model.named_modules()}, model.state_dict()

    def fail() -> None:
        with one_stem(model):
            assert type(model.conv1) is StemConvolution
            assert type(model.bn1) is StemBatchNorm2d
            assert model.state_dict().keys() == state.keys()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert {name: type(m) for name, m in model.named_modules()} == before
    assert not {"left", "behind"} & (vars(model.conv1).keys() | vars(model.bn1).keys())


@has_kernel
def test_a_batch_that_is_not_finite_does_not_poison_the_statistics() -> None:
    model, x = network(), torch.randn(SHAPE)
    x[0, 0, 0, 0] = torch.inf
    with one_stem(model), pytest.warns(RuntimeWarning, match="non-finite"):
        model(x)
    assert torch.equal(model[1].running_var, torch.ones(5))
    assert int(model[1].num_batches_tracked) == 0


class Checkpointed(nn.Module):
    """Keeps nothing of its layers for the backward pass, and runs them again there."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers."""
        found: Tensor = checkpoint(self.layers, x, use_reentrant=False)
        return found


@has_kernel
def test_activation_checkpointing_counts_a_batch_once() -> None:
    layers, x = network(activation="relu"), torch.randn(SHAPE)
    expected = results(copy.deepcopy(layers), x)
    model = Checkpointed(layers)
    with one_stem(layers):
        found = results(model, x)
    for our, their in zip(found, expected, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4)
