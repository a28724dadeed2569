"""What is drawn: by torch, NumPy, Python, own generators; in training and in evaluation."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .base import IMAGE, OTHER, ROWS, Base, Block
from .harness import call, kind, x


@kind(call(IMAGE), call(OTHER), call(IMAGE))
class NumpyDecides(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.relu(y) if np.random.rand() < 0.5 else y  # noqa: NPY002


@kind(call(IMAGE), call(OTHER), call(IMAGE))
class PythonDecides(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.relu(y) + x if random.random() < 0.5 else y


@kind(call(IMAGE), call(OTHER), call(IMAGE))
class TorchDecides(Base):
    def forward(self, x):
        if self.training and torch.rand(()) < 0.5:
            return x
        return self.relu(self.bn(self.conv(x)) + x)


@kind(call(IMAGE), call(OTHER))
class NumpyScales(Base):
    """A number that a symbolic run would freeze."""

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)) * np.random.uniform(0.5, 1.5))  # noqa: NPY002


@kind(call(IMAGE), call(OTHER), never=("recalibrate",))
class PythonChooses(Base):
    def forward(self, x):
        return self.relu(random.choice([self.bn, self.bn2])(self.conv(x)))


@kind(call(IMAGE), call(OTHER))
class OwnGenerator(Base):
    def __init__(self):
        super().__init__()
        self.random = np.random.default_rng(3)

    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.relu(y) if self.random.random() < 0.5 else y


@kind(call(IMAGE), call(OTHER))
class OwnPythonRandom(Base):
    def __init__(self):
        super().__init__()
        self.random = random.Random(3)
        self.drawn = []

    def forward(self, x):
        self.drawn.append(self.random.random())
        y = self.bn(self.conv(x))
        return self.relu(y) if self.drawn[-1] < 0.5 else y


class DropPath(nn.Module):
    """Stochastic depth, as timm has it."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1 - self.rate
        return x * x.new_empty((x.size(0), 1, 1, 1)).bernoulli_(keep).div_(keep)


@kind(call(IMAGE), call(OTHER))
class StochasticDepth(Base):
    def __init__(self):
        super().__init__()
        self.drop = DropPath(0.4)

    def forward(self, x):
        return self.relu(self.drop(self.bn(self.conv(x))) + x)


@kind(call(IMAGE), call(OTHER), must=("convert", "fold"))
class StochasticDepthOff(Base):
    """A rate of 0 now, another one after surgery."""

    def __init__(self):
        super().__init__()
        self.drop = DropPath(0.0)

    def forward(self, x):
        return self.relu(self.drop(self.bn(self.conv(x))) + x)


@kind(call(IMAGE), call(OTHER))
class RateSetLater(Base):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        y = self.relu(self.drop(self.bn(self.conv(x))))
        self.drop.p = min(0.5, self.drop.p + 0.2)
        return y


@kind(call(IMAGE), call(OTHER))
class DropoutBetween(Base):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout2d(0.3)

    def forward(self, x):
        return self.relu(self.drop(self.bn(self.conv(x))))


@kind(call(IMAGE), call(OTHER))
class DropoutBefore(Base):
    def forward(self, x):
        return self.relu(self.bn(self.conv(F.dropout(x, 0.2, self.training))))


@kind(call(IMAGE), call(OTHER))
class DropoutAlways(Base):
    """Monte Carlo dropout: drawn in evaluation too."""

    def forward(self, x):
        return F.dropout(self.relu(self.bn(self.conv(x))), 0.3, training=True)


@kind(call(IMAGE), call(OTHER))
class FunctionalDropoutInTraining(Base):
    """``F.dropout`` with its default, which is to drop always."""

    def forward(self, x):
        return self.relu(F.dropout(self.bn(self.conv(x)), 0.1))


@kind(call(IMAGE), call(OTHER))
class NoiseAdded(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.relu(y + torch.randn_like(y))


@kind(call(IMAGE), call(OTHER))
class NoiseInTraining(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        if self.training:
            y = y + torch.randn(y.shape, dtype=y.dtype) * 0.1
        return self.relu(y)


@kind(call(ROWS), call(x(6, 5, at=1)), never=("recalibrate",))
class VariationalAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.bn = nn.Linear(5, 4), nn.BatchNorm1d(4)
        self.mean, self.spread = nn.Linear(4, 2), nn.Linear(4, 2)
        self.back, self.bn2 = nn.Linear(2, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        h = F.relu(self.bn(self.fc(x)))
        mean, spread = self.mean(h), self.spread(h)
        z = mean + torch.randn_like(mean) * (0.5 * spread).exp()
        return self.bn2(self.back(z)).sigmoid(), mean, spread


@kind(call(IMAGE), call(OTHER))
class LayerDrop(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            if self.training and random.uniform(0, 1) < 0.5:
                continue
            x = block(x)
        return x


@kind(call(IMAGE), call(OTHER))
class Shuffled(Base):
    """Statistics of a shuffled batch (MoCo's shuffling)."""

    def forward(self, x):
        order = torch.randperm(len(x))
        y = self.relu(self.bn(self.conv(x[order])))
        return y[torch.argsort(order)]


@kind(call(IMAGE), call(OTHER))
class RandomActivation(Base):
    def forward(self, x):
        return F.rrelu(self.bn(self.conv(x)), training=self.training)


@kind(call(IMAGE), call(OTHER))
class SeedsItself(Base):
    """Seeds the global generator, as some samplers do."""

    def forward(self, x):
        torch.manual_seed(1)
        return self.relu(self.bn(self.conv(x))) * torch.rand(1, dtype=x.dtype)


@kind(call(IMAGE), call(OTHER))
class ForkedRandom(Base):
    def forward(self, x):
        with torch.random.fork_rng():
            torch.manual_seed(4)
            mask = torch.rand_like(x) < 0.5
        return self.relu(self.bn(self.conv(x)) * mask)
