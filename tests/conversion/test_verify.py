"""What the comparison behind ``convert(example=)`` takes for a difference, and what for rounding."""

import pytest
import torch
from torch import nn

import gammabeta as gb


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
