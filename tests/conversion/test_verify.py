"""What the comparison behind ``convert(example=)`` takes for a difference, and what for rounding."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gammabeta as gb
from gammabeta.conversion.verify import verify
from gammabeta.errors import SurgeryError


@pytest.mark.parametrize("bias", [False, True])
def test_what_is_all_rounding_is_not_taken_back(bias: bool) -> None:
    """The mean of what follows a batch norm, and the gradient of a bias before it, are 0 but for rounding."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = [nn.Conv2d(3, 32, 3, bias=bias), nn.BatchNorm2d(32)]
    for _ in range(6):
        blocks += [nn.Conv2d(32, 32, 1, bias=bias), nn.BatchNorm2d(32)]
    model = nn.Sequential(*blocks, nn.ReLU())
    report = gb.convert(model, example=torch.randn(8, 3, 32, 32)).conversion_report
    assert not [change.reason for change in report.changes if "taken back" in change.reason]
    assert [change.after for change in report.changes] == ["gammabeta.nn.BatchNorm2d"] * 7


def deep() -> nn.Sequential:
    """A network in which float32 rounding moves gradients by tenths of a percent."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    for _ in range(8):
        layers += [nn.Conv2d(32, 64, 1), nn.BatchNorm2d(64), nn.ReLU6()]
        layers += [nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.BatchNorm2d(64), nn.ReLU6()]
        layers += [nn.Conv2d(64, 32, 1), nn.BatchNorm2d(32)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def louder(module: nn.Module, _: Any, output: Tensor) -> Tensor:
    return output * torch.where(torch.arange(output.shape[1]) == 3, 1.05, 1.0)[:, None, None]


def larger_gradient(module: nn.Module, _: Any, output: Tensor) -> None:
    output.register_hook(lambda gradient: gradient * 1.03)


FAULTS = {
    "another momentum": lambda twin: setattr(twin[18], "momentum", 0.11),
    "another eps": lambda twin: setattr(twin[12], "eps", 1e-3),
    "one channel louder": lambda twin: twin[18].register_forward_hook(louder),
    "larger gradients": lambda twin: twin[18].register_forward_hook(larger_gradient),
    "no activation": lambda twin: twin.__setitem__(13, nn.Identity()),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_from_rounding(name: str) -> None:
    model, example = deep(), torch.randn(8, 3, 32, 32)
    twin = copy.deepcopy(model)
    assert not verify(model, twin, example, True, []).taken_back
    FAULTS[name](twin)
    with pytest.raises(SurgeryError, match="differs"):
        verify(model, twin, example, True, [])
