"""What stands around a layer, as a recorded run shows it."""

import torch
from torch import Tensor, nn

from gammabeta.doctor.evidence import Surroundings
from gammabeta.doctor.trace import surroundings


class Network(nn.Module):
    """Three norms: behind a convolution, behind a dropout and more, and called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.drop, self.second = nn.Dropout(0.3), nn.BatchNorm2d(2)
        self.linear, self.last = nn.Linear(5, 2, bias=False), nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Run (N, 3, 2, 2)."""
        x = torch.relu(self.first(self.conv(x).contiguous()))
        one, two = self.drop(x).chunk(2, dim=1)
        y = self.second(one + two).flatten(1)
        y = self.last(self.linear(torch.cat([y, y], 1)[:, :5]))
        z: Tensor = self.last(self.drop(y))
        return z


def test_surroundings():
    model = Network().eval()
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    assert surroundings(model, lambda: model(torch.randn(2, 3, 2, 2))) == {
        "first": Surroundings("conv", producer_bias=True, relu_after=True, calls=1),
        "second": Surroundings(dropout=0.3, calls=1),
        "last": Surroundings("linear", producer_bias=False, calls=2),
    }
    assert [dict(module._forward_hooks) for module in model.modules()] == hooks


def test_dropout_right_before():
    model = nn.Sequential(
        nn.Linear(3, 3), nn.Dropout(0.2), nn.BatchNorm1d(3), nn.Dropout(0.1), nn.ReLU()
    ).eval()
    found = surroundings(model, lambda: model(torch.randn(2, 3)))
    assert found == {"2": Surroundings(dropout=0.2, dropout_direct=True, calls=1)}
