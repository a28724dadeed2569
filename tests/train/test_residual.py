"""The residual network: what it computes is plain PyTorch's, and a run folder finds it again."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gammabeta as gb
from gammabeta.data import Dataset
from gammabeta.errors import UsageError
from gammabeta.train import ResidualNetwork, build_network, fit, load_recipe
from gammabeta.train.networks import network_of
from gammabeta.train.residual import Block
from gammabeta.train.session import describe

NORM = {"eps": 1e-5, "momentum": 0.1}


def plainly(block: Block, x: torch.Tensor) -> torch.Tensor:
    """A block in torch's own operators, with the batch's statistics."""

    def norm(layer: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)

    out = F.relu(norm(block.bn1, block.conv1(x)))
    shortcut = x
    if not isinstance(block.shortcut, nn.Identity):
        strided = F.conv2d(x, block.shortcut[0].weight, stride=block.stride)  # as the paper has it
        shortcut = norm(block.shortcut[1], strided)
    return F.relu(norm(block.bn2, block.conv2(out)) + shortcut)


@pytest.mark.parametrize(("before", "stride"), [(8, 1), (4, 1), (4, 2)])
def test_a_block_is_that_of_the_paper(before: int, stride: int) -> None:
    block = Block(before, 8, stride, NORM)
    x = torch.randn(4, before, 10, 12)
    torch.testing.assert_close(block(x), plainly(block, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "expected"), [((32, 40), (32, 40)), ((48, 64), (24, 32))])
def test_large_pictures_are_halved_by_the_first_layer(size, expected) -> None:
    network = ResidualNetwork(3, size, 7, width=4, depth=2, norm=NORM)
    seen = []
    network.stage1.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0].shape, out.shape)))
    assert network(torch.randn(2, 3, *size)).shape == (2, 7)
    assert seen == [((2, 4, *expected), (2, 4, *expected))]


def test_every_batch_norm_is_ours_and_the_twin_has_none() -> None:
    norms = [
        m for m in ResidualNetwork(norm=NORM).modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    assert len(norms) == 9
    assert {type(layer) for layer in norms} == {gb.nn.BatchNorm2d}
    twin = ResidualNetwork(1, (50, 50), 3, width=4)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in twin.modules())
    assert twin(torch.randn(2, 1, 50, 50)).shape == (2, 3)
    with pytest.raises(UsageError):
        ResidualNetwork(classes=1)


def test_a_run_finds_its_network_again(digits: Dataset) -> None:
    recipe = load_recipe("pictures", {"width": 6, "depth": 2})
    network = build_network(recipe, digits, 1)
    again = network_of(describe(digits, recipe))
    assert type(again) is ResidualNetwork
    again.load_state_dict(network.state_dict())
    x = torch.randn(3, 1, 28, 28)
    torch.testing.assert_close(again.eval()(x), network.eval()(x), rtol=0, atol=0)


def test_it_learns(digits: Dataset) -> None:
    settings = {
        "width": 8,
        "epochs": 10,
        "rotation": 0,
        "batch_size": 32,
        "crop": 1,
        "flip": False,
        "precision": "fp32",
    }
    recipe = load_recipe("pictures", settings)
    outcome = fit(build_network(recipe, digits, 0), digits, recipe, device="cpu")
    assert outcome.test.accuracy > 0.8
