"""A forward that writes: counters, buffers, lists, parameters, modes of children."""

from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from .base import IMAGE, OTHER, ROWS, Base, Block
from .harness import call, kind, x

SEEN = []
COUNTS = {"calls": 0}


@kind(call(IMAGE), call(OTHER))
class CountsCalls(Base):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.relu(self.bn(self.conv(x)))


@kind(call(IMAGE), call(OTHER))
class BufferCounter(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("step", torch.tensor(0))

    def forward(self, x):
        self.step += 1
        return self.relu(self.bn(self.conv(x)))


@kind(call(IMAGE), call(OTHER))
class BufferReplaced(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        y = self.bn(self.conv(x))
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean((0, 2, 3))
        return self.relu(y) - self.mean.view(1, 3, 1, 1)


@kind(call(IMAGE), call(OTHER), call(IMAGE))
class EverySecondCall(Base):
    """Every second call is another one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("step", torch.tensor(0), persistent=False)

    def forward(self, x):
        self.step.add_(1)
        y = self.bn(self.conv(x))
        return self.relu(y) if self.step % 2 == 1 else y


@kind(call(IMAGE), call(OTHER))
class ListOfOutputs(Base):
    def __init__(self):
        super().__init__()
        self.features = []

    def forward(self, x):
        y = self.bn(self.conv(x))
        self.features.append(y.detach())
        return self.relu(y)


@kind(call(IMAGE), call(OTHER))
class LastOutputKept(Base):
    last = None

    def forward(self, x):
        y = self.bn(self.conv(x))
        self.last = y
        return self.relu(y)


@kind(call(IMAGE), call(OTHER))
class DictOfOutputs(Base):
    def __init__(self):
        super().__init__()
        self.kept = {}
        self.counts = Counter()
        self.grouped = defaultdict(list)

    def forward(self, x):
        y = self.kept["norm"] = self.bn(self.conv(x))
        self.counts["calls"] += 1
        self.grouped[tuple(x.shape)].append(float(y.detach().sum()))
        return self.relu(y)


@dataclass
class Record:
    shapes: list = field(default_factory=list)
    values: list = field(default_factory=list)


@kind(call(IMAGE), call(OTHER))
class DataclassRecorder(Base):
    def __init__(self):
        super().__init__()
        self.record = Record()

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        self.record.shapes.append(y.shape)
        self.record.values.append(y.detach().mean())
        return y


@kind(call(IMAGE), call(OTHER), reset=SEEN.clear, outside=lambda: SEEN)
class GlobalList(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        SEEN.append(y.detach())
        return self.relu(y)


def _forget():
    COUNTS["calls"] = 0


@kind(call(IMAGE), call(OTHER), reset=_forget, outside=lambda: dict(COUNTS))
class GlobalCounter(Base):
    def forward(self, x):
        COUNTS["calls"] += 1
        return self.relu(self.bn(self.conv(x)))


@kind(call(IMAGE), call(OTHER))
class Queue(Base):
    """The mean of the last three outputs is added."""

    def __init__(self):
        super().__init__()
        self.queue = deque(maxlen=3)

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        self.queue.append(y.detach().mean())
        return y + sum(self.queue)


@kind(call(IMAGE), call(x(4, 3, 8, 8)), call(OTHER))
class CachedGrid(Base):
    """What depends on the size is made at the first call of the size."""

    def __init__(self):
        super().__init__()
        self.grids = {}

    def forward(self, x):
        size = tuple(x.shape[2:])
        if size not in self.grids:
            self.grids[size] = torch.linspace(0, 1, size[1], dtype=x.dtype)
        return self.relu(self.bn(self.conv(x)) + self.grids[size])


@kind(call(IMAGE), call(OTHER))
class BuiltAtFirstCall(Base):
    """A layer is made by the first call."""

    def __init__(self):
        super().__init__()
        self.head = None

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        if self.head is None:
            self.scale = 2.0
            self.head = nn.Flatten()
        return self.head(y) * self.scale


@kind(call(IMAGE), call(OTHER))
class MomentumEncoder(Base):
    """A second encoder follows the first: its parameters are written by forward (MoCo, BYOL)."""

    def __init__(self):
        super().__init__()
        self.online, self.target = Block(), Block()
        for p in self.target.parameters():
            p.requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            for a, b in zip(self.online.parameters(), self.target.parameters(), strict=True):
                b.mul_(0.5).add_(a, alpha=0.5)
            goal = self.target(x)
        return self.online(x), goal


@kind(call(IMAGE), call(OTHER))
class StatisticsAsParameters(Base):
    """Running statistics of its own that are parameters."""

    def __init__(self):
        super().__init__()
        self.center = nn.Parameter(torch.zeros(3), requires_grad=False)

    def forward(self, x):
        y = self.bn(self.conv(x))
        self.center.data = 0.9 * self.center.data + 0.1 * y.detach().mean((0, 2, 3))
        return self.relu(y - self.center.view(1, 3, 1, 1))


@kind(call(IMAGE), call(OTHER))
class WeightsClipped(Base):
    def forward(self, x):
        with torch.no_grad():
            self.conv.weight.clamp_(-0.05, 0.05)
        return self.relu(self.bn(self.conv(x)))


@kind(call(IMAGE), call(OTHER))
class WeightsNormalized(Base):
    """Weights are divided by their norm in each forward (ArcFace, some GANs)."""

    def forward(self, x):
        self.conv2.weight.data = F.normalize(self.conv2.weight.data, dim=1) * 0.9
        return self.relu(self.bn(self.conv2(x)))


@kind(call(IMAGE), call(OTHER))
class GammaWritten(Base):
    """The batch norm's own weight is written by forward."""

    def forward(self, x):
        with torch.no_grad():
            self.bn.weight.mul_(0.9)
        return self.relu(self.bn(self.conv(x)))


@kind(call(IMAGE), call(OTHER))
class BatchNormHeldInEvaluation(Base):
    """``train()`` leaves batch norm in evaluation (norm_eval)."""

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))

    def train(self, mode=True):
        super().train(mode)
        self.bn.eval()
        return self


@kind(call(IMAGE), call(OTHER))
class ChildSetToEvaluation(Base):
    """Forward itself sets a child's mode."""

    def __init__(self):
        super().__init__()
        self.teacher = Block()

    def forward(self, x):
        self.teacher.eval()
        return self.relu(self.bn(self.conv(x)) + self.teacher(x))


@kind(call(IMAGE), call(OTHER))
class ModeSwitchedInside(Base):
    """A pass in evaluation beside, with the mode put back.

    In this order: torch's gradient of a pass in evaluation is wrong where one in training comes after it, and
    changes the running statistics before the backward pass reads them. Ours is right.
    """

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        was = self.bn.training
        self.bn.eval()
        z = self.relu(self.bn(x))
        self.bn.train(was)
        return y + z


@kind(call(IMAGE), call(OTHER))
class StatisticsSwitchedOff(Base):
    """The running statistics are left alone during one of two calls."""

    def forward(self, x):
        self.bn.track_running_stats = False
        y = self.bn(x)
        self.bn.track_running_stats = True
        return self.relu(self.bn(self.conv(x))) + y.detach()


@kind(call(IMAGE), call(OTHER))
class MomentumChanged(Base):
    """Batch renormalization schedules, and warm-ups, change momentum."""

    def forward(self, x):
        self.bn.momentum = 1 / (2 + float(self.bn.num_batches_tracked))
        return self.relu(self.bn(self.conv(x)))


@kind(call(IMAGE), call(OTHER))
class ReadsRunningMean(Base):
    def forward(self, x):
        before = self.bn.running_mean.clone()
        y = self.relu(self.bn(self.conv(x)))
        return y + (self.bn.running_mean - before).view(1, 3, 1, 1)


@kind(call(IMAGE), call(OTHER))
class ReadsWeights(Base):
    """A penalty reads the norm's weight and the convolution's."""

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        return y, self.bn.weight.abs().sum() + self.conv.weight.norm()


@kind(call(IMAGE), call(OTHER))
class WhitensOutput(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("bank", torch.zeros(8, 3))
        self.register_buffer("at", torch.zeros(1, dtype=torch.long))

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        keys = y.detach().mean((2, 3))
        start = int(self.at)
        self.bank[start : start + len(keys)] = keys
        self.at[0] = (start + len(keys)) % 8
        return y + self.bank.mean()


@kind(call(IMAGE), call(OTHER))
class SpectralNorm(Base):
    """Power iteration writes a buffer in training."""

    def __init__(self):
        super().__init__()
        self.conv = nn.utils.parametrizations.spectral_norm(self.conv)

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


@kind(call(IMAGE), call(OTHER))
class WeightNorm(Base):
    def __init__(self):
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(self.conv)

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


@kind(call(IMAGE), call(OTHER))
class GradientSwitched(Base):
    def forward(self, x):
        self.conv.weight.requires_grad_(False)
        return self.relu(self.bn(self.conv(x)))


@kind(call(IMAGE), call(OTHER))
class DictionaryGivenIsWritten(Base):
    def forward(self, x, notes=None):
        notes = {} if notes is None else notes
        y = self.bn(self.conv(x))
        notes["mean"] = y.mean()
        return self.relu(y), notes


@kind(call(IMAGE, []), call(OTHER, []))
class ListGivenIsWritten(Base):
    def forward(self, x, taps):
        y = self.bn(self.conv(x))
        taps.append(y)
        y = self.relu(y)
        taps.append(y)
        return y


@kind(call(ROWS), call(x(6, 5, at=1)))
class HandWrittenNorm(nn.Module):
    """Statistics by hand, in plain attributes."""

    def __init__(self):
        super().__init__()
        self.fc, self.bn = nn.Linear(5, 4), nn.BatchNorm1d(4)
        self.average = torch.zeros(4, dtype=torch.float64)

    def forward(self, x):
        y = self.bn(self.fc(x))
        if self.training:
            self.average = self.average * 0.9 + y.detach().mean(0) * 0.1
        return F.relu(y - self.average)
