"""What happens between a batch norm and what follows it: surgery must not move the one past the other."""

import torch
import torch.nn.functional as F
from torch import nn

from .base import IMAGE, OTHER, Base
from .harness import Call, call, kind, x

FLAT = x(4, 3)
# What a backward pass reads is written to behind torch's back: the outputs alone can be compared.
QUIET = (Call((IMAGE,), around=torch.no_grad), Call((OTHER,), around=torch.no_grad))


@kind(call(IMAGE), call(OTHER))
class AliasOfStatisticsRead(Base):
    """Another name for the running mean, read after the call."""

    def forward(self, x):
        mean = self.bn.running_mean
        y = self.bn(self.conv(x))
        before = mean * 1.0
        return self.relu(y) + before.view(1, 3, 1, 1)


@kind(call(IMAGE), call(OTHER))
class AliasOfStatisticsAdded(Base):
    def forward(self, x):
        mean = self.bn.running_mean.view(1, 3, 1, 1)
        return self.relu(self.bn(self.conv(x)) + mean)


@kind(call(IMAGE), call(OTHER))
class PropertyReadsStatistics(Base):
    @property
    def energy(self):
        return self.bn.running_mean.sum()

    def forward(self, x):
        y = self.bn(self.conv(x))
        energy = self.energy
        return self.relu(y) + energy


@kind(call(IMAGE), call(OTHER))
class SumWithAProperty(Base):
    @property
    def shift(self):
        return float(self.bn.num_batches_tracked)

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)) + self.shift)


@kind(call(IMAGE), call(OTHER))
class PropertyWritesStatistics(Base):
    @property
    def reset(self):
        return None

    @reset.setter
    def reset(self, value):
        self.bn.running_mean.fill_(value)

    def forward(self, x):
        y = self.bn(self.conv(x))
        self.reset = 0.5
        return self.relu(y)


@kind(call(IMAGE), call(OTHER))
class CallbackReadsStatistics(Base):
    """A function in an attribute looks at the layer."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        layer = self.bn
        look = lambda: self.seen.append(layer.running_mean.sum().item())  # noqa: E731
        y = self.bn(self.conv(x))
        look()
        return self.relu(y)


@kind(call(IMAGE), call(OTHER))
class LayerInAnObject(Base):
    """The layer is reached through an object that is no module."""

    class Watcher:
        def __init__(self, layer):
            self.layer, self.seen = [layer], []

        def look(self):
            self.seen.append(int(self.layer[0].num_batches_tracked))

    def __init__(self):
        super().__init__()
        self.watcher = self.Watcher(self.bn)

    def forward(self, x):
        y = self.bn(self.conv(x))
        self.watcher.look()
        return self.relu(y)


@kind(*QUIET)
class WeightWrittenAfter(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        self.bn.weight.data.mul_(0.9)
        return self.relu(y)


@kind(*QUIET)
class WeightReplacedAfter(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        self.bn.weight.data = self.bn.bias.data
        return self.relu(y)


@kind(call(IMAGE), call(OTHER))
class ModeWrittenAfter(Base):
    """The mode is an attribute, and is written as one."""

    def forward(self, x):
        self.bn.training = self.training
        y = self.bn(self.conv(x))
        self.bn.training = False
        return self.relu(y)


@kind(call(IMAGE), call(OTHER))
class BuffersWrittenAfterAFunction(Base):
    def forward(self, x):
        b = self.bn
        mean, var = b.running_mean, b.running_var
        y = F.batch_norm(self.conv(x), mean, var, b.weight, b.bias, self.training, 0.1, 1e-5)
        mean.zero_()
        return self.relu(y)


@kind(call(IMAGE), call(OTHER))
class ReadAfterAFunction(Base):
    def forward(self, x):
        b = self.bn
        mean, var = b.running_mean, b.running_var
        y = F.batch_norm(self.conv(x), mean, var, b.weight, b.bias, self.training, 0.1, 1e-5)
        shift = mean.sum()
        return self.relu(y) - shift


@kind(call(IMAGE), call(OTHER))
class BaseOfInputWritten(Base):
    """The norm takes a view that nothing else holds; what it is a view of is written to."""

    def forward(self, x):
        base = self.conv(x).detach()
        y = self.bn(base.view_as(base))
        base.mul_(0.0)
        return self.relu(y)


@kind(*QUIET)
class DataOfInputWritten(Base):
    """``.data`` shares memory and counts no changes."""

    def forward(self, x):
        base = self.conv(x)
        y = self.bn(base.view_as(base))
        base.data.mul_(0.0)
        return self.relu(y)


@kind(*QUIET)
class NumpyOfInputWritten(Base):
    def forward(self, x):
        array = x.detach().clone().numpy()
        y = self.bn(torch.from_numpy(array))
        array[:] = 0
        return self.relu(y)


@kind(*QUIET)
class InputsDataReplaced(Base):
    def forward(self, x):
        zero = torch.zeros_like(x)
        h = self.conv(x).detach()
        y = self.bn(h)
        h.data = zero
        return self.relu(y)


@kind(call(IMAGE), call(OTHER))
class ResidualsDataReplaced(Base):
    def forward(self, x):
        zero = torch.zeros_like(x)
        skip = x * 1
        y = self.bn(self.conv(x)) + skip
        skip.data = zero
        return self.relu(y)


@kind(call(IMAGE), call(OTHER))
class ResidualWrittenAfterTheSum(Base):
    def forward(self, x):
        skip = x * 1
        y = self.bn(self.conv(x)) + skip
        skip.mul_(0.0)
        return self.relu(y)


@kind(call(IMAGE), call(OTHER))
class InputWrittenInTheSum(Base):
    """The other operand of the sum is made by writing to the norm's input."""

    def forward(self, x):
        h = self.conv(x).detach()
        return self.relu(self.bn(h) + h.mul_(0.5))


@kind(call(IMAGE), call(OTHER))
class AliasBeforeTheSumInPlace(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        z = y
        y += x
        return self.relu(y) * z


@kind(call(IMAGE), call(OTHER))
class AliasThroughIdentity(Base):
    """What does nothing gives back the same tensor, which is then written to."""

    def __init__(self):
        super().__init__()
        self.same = nn.Identity()

    def forward(self, x):
        y = self.bn(self.conv(x))
        z = self.same(y)
        z += x
        return self.relu(y) * z.mean()


@kind(call(IMAGE), call(OTHER))
class GradientsOffByHand(Base):
    """A context is entered and left without ``with``."""

    def forward(self, x):
        quiet = torch.no_grad()
        quiet.__enter__()
        y = self.bn(self.conv(x))
        quiet.__exit__(None, None, None)
        return self.relu(y + x)


@kind(call(IMAGE), call(OTHER))
class GradientsOffByAnotherName(Base):
    def forward(self, x):
        switch = torch._C._set_grad_enabled
        was = torch.is_grad_enabled()
        switch(False)
        y = self.bn(self.conv(x))
        switch(was)
        return self.relu(y + x)


class WithoutGradient(nn.Module):
    """A part whose whole forward is without gradient."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    @torch.no_grad()
    def forward(self, x):
        return self.bn(x)


@kind(call(IMAGE), call(OTHER))
class DecoratedPart(Base):
    def __init__(self):
        super().__init__()
        self.part = WithoutGradient()

    def forward(self, x):
        return self.relu(self.part(self.conv(x)) + x)


def _checked(x):
    if not torch.isfinite(x).all():
        raise ValueError("not finite")


@kind(call(IMAGE), call(torch.full((4, 3, 6, 6), float("inf")).double() * IMAGE.sign()), call(OTHER))
class RaisesAfterTheNorm(Base):
    """The running statistics have taken in the batch when the error comes."""

    def forward(self, x):
        y = self.bn(torch.nan_to_num(x, posinf=1.0, neginf=-1.0))
        _checked(x)
        return self.relu(y)


@kind(call(IMAGE), Call((FLAT,), fold=False))
class CountsAfterTheNorm(Base):
    """A norm that refuses its input does so before the call is counted."""

    calls = 0

    def forward(self, x):
        y = self.bn(x)
        self.calls += 1
        return self.relu(y)


@kind(call(IMAGE), call(OTHER))
class ContinueAfterTheNorm(Base):
    def forward(self, x):
        for i in range(3):
            y = self.bn(x)
            if i == 1:
                continue
            x = self.relu(y)
        return x


@kind(call(IMAGE), call(OTHER))
class BreakAfterTheNorm(Base):
    def forward(self, x):
        turn = 0
        while True:
            y = self.bn(x)
            turn += 1
            if turn == 3:
                break
            x = self.relu(y)
        return x


@kind(call(IMAGE), call(OTHER))
class OutputNotUsed(Base):
    """A call for its statistics only (adaptive batch norm)."""

    def forward(self, x):
        self.bn(x)
        y = self.bn2(self.conv(x))
        unused = self.bn(x * 2)  # noqa: F841
        return self.relu(y)


@kind(call(IMAGE), call(IMAGE, False))
class UsedOnOneWayOnly(Base):
    def forward(self, x, use=True):
        y = self.bn(self.conv(x))
        if use:
            z = self.relu(y)
        else:
            z = self.bn(x)
            z = self.relu(z)
        return z


@kind(call(IMAGE, OTHER), call(OTHER, IMAGE))
class TwoCallsThenTwoActivations(Base):
    """The running statistics see the inputs in the order of the calls."""

    def forward(self, a, b):
        y = self.bn(a)
        z = self.bn(b)
        return torch.sigmoid(z) + self.relu(y)


@kind(call(IMAGE, OTHER), call(OTHER, IMAGE))
class SharedStatistics(Base):
    """Two layers, one memory for their running statistics."""

    def __init__(self):
        super().__init__()
        self.bn2.running_mean, self.bn2.running_var = self.bn.running_mean, self.bn.running_var

    def forward(self, a, b):
        y = self.bn(a)
        z = self.bn2(b)
        return torch.sigmoid(z) + self.relu(y)


@kind(call(IMAGE), call(OTHER))
class ActivationWithWeightsWritten(Base):
    """The activation's own settings change between."""

    def __init__(self):
        super().__init__()
        self.act = nn.LeakyReLU(0.1)

    def forward(self, x):
        self.act.negative_slope = 0.1
        y = self.act(self.bn(self.conv(x)))
        self.act.negative_slope = 0.9
        return F.avg_pool2d(y, 2)


@kind(call(IMAGE), call(OTHER))
class ShownInText(Base):
    """Values in a text, a condition, a set of names."""

    def forward(self, x):
        y = self.bn(self.conv(x))
        text = f"{y.sum().item():.3f} {y.shape}"
        self.text = text if y is not None else ""
        del text
        return self.relu(y)


@kind(call(IMAGE), call(OTHER))
class LocalsLookedAt(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        total = sum(v.mean() for v in list(locals().values()) if isinstance(v, torch.Tensor))
        return self.relu(y) + total


@kind(call(IMAGE), call(OTHER))
class InnerFunctionTakesIt(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))

        def later():
            return y * 2

        z = self.relu(y)
        return z + later()


@kind(call(IMAGE), call(OTHER))
class ReassignedInTheLoop(Base):
    def forward(self, x):
        y = self.bn(x)
        for part in (self.conv, self.conv2):
            y = self.bn2(part(self.relu(y)))
        return y


@kind(call(IMAGE), call(OTHER))
class UnpackedAndStarred(Base):
    def forward(self, x):
        y, *rest = self.bn(x), self.relu(self.bn2(x)), x
        y = self.relu(y)
        first, second = rest
        return y + first + second


@kind(call(IMAGE), call(OTHER))
class ChainedAssignment(Base):
    def forward(self, x):
        y = z = self.bn(self.conv(x))
        y = F.relu_(y)
        return y + z


@kind(call(IMAGE), call(OTHER))
class FinallyUsesIt(Base):
    def forward(self, x):
        try:
            y = self.bn(self.conv(x))
            return self.relu(y)
        finally:
            self.last = y.sum().detach()
