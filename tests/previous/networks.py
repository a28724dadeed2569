"""The networks that the files of this folder hold."""

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """A stem with max pooling, a residual block, mean pooling and a Linear."""

    def __init__(self, features: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.conv_a, self.norm_a = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv_b, self.norm_b = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last = nn.Sequential(nn.Conv2d(8, 8, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2))
        self.head = nn.Linear(72, features)

    def forward(self, x: Tensor) -> Tensor:
        """Run (N, 3, 16, 16)."""
        x = self.pool(self.stem(x))
        y = torch.relu(self.norm_a(self.conv_a(x)))
        x = torch.relu(self.norm_b(self.conv_b(y)) + x)
        logits: Tensor = self.head(self.last(x).flatten(1))
        return logits


class PreActivation(nn.Sequential):
    """Batch norms that cannot fold: the first reads the input, the second an activation."""

    def __init__(self) -> None:
        super().__init__(
            nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 8, 3), nn.ReLU(),
            nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
            nn.BatchNorm2d(8), nn.MaxPool2d(2),
        )  # fmt: skip
