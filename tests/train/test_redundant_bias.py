"""Which biases batch normalization cancels, and that nothing but rounding depends on them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gammabeta as gb
from gammabeta.data import Dataset
from gammabeta.train import build_network, load_recipe
from gammabeta.train.fitting import redundant_biases, without_redundant_biases


def names(model: nn.Module) -> set[str]:
    found = redundant_biases(model)
    return {name for name, p in model.named_parameters() if any(p is bias for bias in found)}


def test_the_notebooks_convolutions(digits: Dataset) -> None:
    network = build_network(load_recipe("classic"), digits, 0)
    assert names(network) == {"conv1.bias", "conv2.bias"}
    assert names(gb.convert(network, to="fused")) == {"conv1.bias", "conv2.bias"}
    twin = build_network(load_recipe("classic", {"batch_norm": False}), digits, 0)
    assert names(twin) == set()


def test_their_gradient_is_zero() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)).double()
    assert names(model) == {"0.bias"}
    model(torch.randn(4, 2, 6, 6).double()).mul(torch.randn(4, 3, 4, 4)).sum().backward()
    assert model[0].bias.grad.abs().max() < 1e-12  # type: ignore[union-attr]
    assert model[2].bias.grad.abs().max() > 1e-3  # type: ignore[union-attr]


class Branching(nn.Module):
    """A network of which one thing at a time keeps the bias from being cancelled."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.norm = nn.Conv2d(2, 2, 1), gb.nn.BatchNorm2d(2)
        self.other = nn.Conv2d(2, 2, 1)
        if kind == "shared":
            self.other.bias = self.conv.bias
        if kind == "hooked":
            self.conv.register_forward_hook(lambda _module, _inputs, out: out.relu())
        if kind == "frozen":
            self.norm = gb.nn.FrozenBatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and normalise, one way or another."""
        h = self.conv(x)
        if self.kind == "used twice":
            return self.norm(h) + h  # type: ignore[no-any-return]
        if self.kind == "residual":
            return self.norm(self.other(x), h)  # type: ignore[no-any-return]
        if self.kind == "both":
            return self.norm(h, h)  # type: ignore[no-any-return]
        if self.kind == "called twice":
            return self.norm(h) + self.conv(x).relu()  # type: ignore[no-any-return]
        if self.kind == "read":
            return self.norm(h) + self.conv.bias.view(-1, 1, 1)  # type: ignore[union-attr, no-any-return]
        if self.kind == "not traceable" and x.sum() > 0:
            return h  # type: ignore[no-any-return]
        return self.norm(h) + self.other(x)  # type: ignore[no-any-return]


KINDS = ["used twice", "both", "called twice", "read", "not traceable", "shared", "hooked", "frozen"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_that_reaches_further_is_kept(kind: str) -> None:
    assert names(Branching("plain")) == {"conv.bias"}
    assert names(Branching("residual")) == {"other.bias"}
    assert names(Branching(kind)) == set()


def test_gradients_come_back_whatever_happens() -> None:
    model = Branching("plain")
    model.other.bias.requires_grad_(False)  # type: ignore[union-attr]

    def wanted() -> dict[str, Any]:
        return {name: p.requires_grad for name, p in model.named_parameters()}

    def fail() -> None:
        with without_redundant_biases(model):
            assert wanted() == {**before, "conv.bias": False}
            raise KeyError

    before = wanted()
    with pytest.raises(KeyError):
        fail()
    assert wanted() == before
