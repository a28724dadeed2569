"""Where the values of a batch norm go: used twice, written in place, viewed, kept."""

import torch
import torch.nn.functional as F
from torch import nn

from .base import IMAGE, OTHER, SMALL, Base, Block
from .harness import call, kind, x


@kind(call(IMAGE), call(OTHER))
class CalledTwice(Base):
    def forward(self, x):
        return self.relu(self.bn(self.conv(self.relu(self.bn(x)))))


@kind(call(IMAGE), call(OTHER))
class CalledTwiceOnceBare(Base):
    def forward(self, x):
        return self.bn(self.conv(self.relu(self.bn(x))))


@kind(call(IMAGE), call(OTHER))
class OneNormUnderTwoNames(Base):
    def __init__(self):
        super().__init__()
        self.also = self.bn

    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) + torch.tanh(self.also(self.conv2(x)))


@kind(call(IMAGE), call(OTHER))
class OneBlockUnderTwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = Block()
        self.b = nn.Sequential(self.a, nn.Sigmoid(), self.a)

    def forward(self, x):
        return self.b(self.a(x))


@kind(call(IMAGE), call(OTHER))
class SharedWeights(Base):
    """Two norms and two convolutions hold the same parameters."""

    def __init__(self):
        super().__init__()
        self.bn2.weight, self.bn2.bias = self.bn.weight, self.bn.bias
        self.conv3 = nn.Conv2d(3, 3, 3, padding=1)
        self.conv3.weight = self.conv.weight

    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) + self.bn2(self.conv3(x.flip(0)))


@kind(call(IMAGE), call(OTHER))
class OneConvolutionTwoNorms(Base):
    def forward(self, x):
        y = self.conv(x)
        return self.relu(self.bn(y)) + self.bn2(y)


@kind(call(IMAGE), call(OTHER))
class OneConvolutionCalledTwice(Base):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) + self.conv(x + 1)


@kind(call(IMAGE), call(OTHER))
class OutputUsedTwice(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.relu(y) + y


@kind(call(IMAGE), call(OTHER))
class ReluInPlaceOfAlias(Base):
    """Both names are one memory: the second use sees what ReLU wrote."""

    def forward(self, x):
        y = self.bn(self.conv(x))
        z = F.relu(y, inplace=True)
        return z + y


@kind(call(IMAGE), call(OTHER))
class ResidualIsActivatedInPlace(Base):
    """The shortcut is changed in place before it is added (pre-activation ResNets)."""

    def forward(self, x):
        shortcut = x
        y = self.bn(F.relu(x, inplace=True))
        return self.relu(y + shortcut)


@kind(call(IMAGE), call(OTHER))
class InputWrittenAfter(Base):
    def forward(self, x):
        y = self.conv(x)
        z = self.bn(y)
        y.add_(1)
        return self.relu(z) * y.mean()


@kind(call(IMAGE), call(OTHER))
class CallersTensorWritten(Base):
    def forward(self, x):
        y = self.bn(x)
        x.mul_(2)
        return self.relu(y + x)


@kind(call(IMAGE), call(OTHER))
class ViewWrittenBetween(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        y[:, 0].mul_(3)
        return self.relu(y)


@kind(call(IMAGE), call(OTHER))
class ViewOfResidualWritten(Base):
    def forward(self, x):
        skip = self.conv2(x)
        part = skip[:, :1]
        y = self.bn(self.conv(x))
        part.zero_()
        return self.relu(y + skip)


@kind(call(IMAGE), call(OTHER))
class FlatViewWritten(Base):
    def forward(self, x):
        skip = self.conv2(x)
        flat = skip.view(-1)
        y = self.bn(x)
        flat[::2] = 0.5
        return self.relu(y.add_(skip))


@kind(call(IMAGE), call(OTHER))
class DetachedAliasWritten(Base):
    def forward(self, x):
        skip = x * 1
        alias = skip.detach()
        y = self.bn(self.conv(x))
        alias.clamp_(min=0)
        return self.relu(y + skip)


@kind(call(IMAGE), call(OTHER))
class AliasInAList(Base):
    def forward(self, x):
        kept = [x * 1]
        y = self.bn(self.conv(x))
        for one in kept:
            one.neg_()
        return self.relu(y + kept[0])


@kind(call(IMAGE), call(OTHER))
class DataWritten(Base):
    def forward(self, x):
        skip = x * 1
        y = self.bn(self.conv(x))
        skip.data = torch.zeros_like(skip)
        return self.relu(y + skip)


@kind(call(IMAGE), call(OTHER))
class ItemAssigned(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        y[y > 1] = 0
        return self.relu(y)


@kind(call(IMAGE), call(OTHER))
class OutArgument(Base):
    def forward(self, x):
        y = self.bn(self.conv(x)).detach()
        torch.add(y, x.detach(), out=y)
        return self.relu(y)


@kind(call(IMAGE), call(OTHER))
class AddedWithAlpha(Base):
    def forward(self, x):
        return self.relu(torch.add(self.bn(self.conv(x)), x, alpha=0.5))


@kind(call(IMAGE), call(OTHER))
class AddedInPlaceWithAlpha(Base):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x)).add_(x, alpha=2))


@kind(call(IMAGE), call(OTHER))
class Subtracted(Base):
    def forward(self, x):
        return self.relu(x - self.bn(self.conv(x)))


@kind(call(IMAGE), call(OTHER))
class AddedToItself(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.relu(y + y)


@kind(call(IMAGE, x(4, 3, 1, 1)), call(IMAGE, OTHER), call(IMAGE, x(3, 1, 1)), call(IMAGE, x(6)))
class BroadcastResidual(Base):
    def forward(self, x, skip):
        return self.relu(self.bn(self.conv(x)) + skip)


@kind(call(IMAGE, OTHER), call(x(4, 3, 1, 1), OTHER), call(x(1, 3, 6, 6), OTHER))
class ResidualLargerThanTheNorm(Base):
    """The sum has the residual's shape, not the norm's."""

    def forward(self, x, skip):
        return self.relu(self.bn(x) + skip)


@kind(call(IMAGE, OTHER), call(IMAGE, OTHER.float()), call(IMAGE, (OTHER > 0)), call(IMAGE, 2))
class ResidualOfAnotherType(Base):
    def forward(self, x, skip):
        return self.relu(self.bn(x) + skip)


@kind(call(IMAGE, OTHER.to(torch.complex128)), call(IMAGE, OTHER))
class ComplexResidual(Base):
    def forward(self, x, skip):
        return (self.bn(x) + skip).abs()


@kind(call(IMAGE), call(OTHER))
class ResidualIsTheNormsInput(Base):
    def forward(self, x):
        y = self.conv(x)
        y += self.bn(y)
        return y.relu_()


@kind(call(IMAGE), call(OTHER))
class TwoNormsAdded(Base):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x)) + self.bn2(self.conv2(x)))


@kind(call(IMAGE), call(OTHER))
class NormOfANorm(Base):
    def forward(self, x):
        return self.relu(self.bn2(self.bn(self.conv(x))))


@kind(call(IMAGE), call(OTHER))
class Detached(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.relu(y.detach()) + self.bn2(y)


@kind(call(IMAGE), call(OTHER))
class GradientHook(Base):
    """A hook on the norm's output changes its gradient."""

    def forward(self, x):
        y = self.bn(self.conv(x))
        if y.requires_grad:
            y.register_hook(lambda g: g * 2)
        return self.relu(y)


@kind(call(IMAGE), call(OTHER))
class GradientRetained(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        if y.requires_grad:
            y.retain_grad()
        z = self.relu(y)
        return z, (y,)


@kind(call(IMAGE), call(OTHER))
class InnerGradient(Base):
    """A gradient is taken inside forward (gradient penalty)."""

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = self.relu(self.bn(self.conv(x)))
            (grad,) = torch.autograd.grad(y.sum() + (y * y).sum(), x, create_graph=True)
        return y, grad


@kind(call(IMAGE), call(OTHER), call(x(4, 3, 7, 7)))
class Chunked(Base):
    def forward(self, x):
        a, b = self.bn(self.conv(x)).chunk(2, 2)
        return self.relu(a), b.sigmoid()


@kind(call(IMAGE), call(OTHER))
class Concatenated(Base):
    """DenseNet: concatenation, then a norm, then a convolution."""

    def __init__(self):
        super().__init__()
        self.wide = nn.BatchNorm2d(6)
        self.last = nn.Conv2d(6, 3, 1)

    def forward(self, x):
        y = torch.cat([x, self.relu(self.bn(x))], 1)
        return self.last(self.relu(self.wide(y)))


@kind(call(IMAGE), call(x(4, 3, 7, 5)), call(SMALL))
class PoolAfter(Base):
    def forward(self, x):
        return F.max_pool2d(self.relu(self.bn(self.conv(x))), 2), F.avg_pool2d(self.bn2(x), 2)


@kind(call(IMAGE), call(OTHER))
class PoolUsedWithIndices(Base):
    def forward(self, x):
        y, where = F.max_pool2d(self.relu(self.bn(x)), 2, return_indices=True)
        return F.max_unpool2d(y, where, 2)


@kind(call(IMAGE), call(OTHER))
class ActivationsNotSupported(Base):
    def __init__(self):
        super().__init__()
        self.act = nn.PReLU(3)
        self.threshold = nn.Threshold(0.1, -0.3)

    def forward(self, x):
        a = self.act(self.bn(self.conv(x)))
        b = self.threshold(self.bn2(x))
        return F.hardtanh(self.bn(a), -0.5, 0.5), F.celu(b, 0.7), F.gelu(b, approximate="tanh")


@kind(call(IMAGE), call(OTHER))
class SlopesOfAllKinds(Base):
    def forward(self, x):
        a = F.leaky_relu(self.bn(self.conv(x)), 0.2)
        b = F.leaky_relu_(self.bn2(x), negative_slope=0.05)
        c = F.elu(self.bn(x), 0.5)
        return a, b, c, F.softplus(self.bn2(a), beta=2)


@kind(call(x(4, 3, 6, 6), x(4, 3, 6, 6, at=9)), call(SMALL, SMALL))
class Siamese(Base):
    """One branch, called for two inputs, whose running statistics see both in order."""

    def branch(self, x):
        return self.relu(self.bn(self.conv(x)))

    def forward(self, a, b):
        return (self.branch(a) - self.branch(b)).abs()


@kind(call(x(3, 4, 3, 6, 6)), call(x(2, 2, 3, 6, 6)))
class TimeSteps(Base):
    """A norm called once a step, and an own one for each of the first steps."""

    def forward(self, x):
        state = torch.zeros_like(x[0])
        for step in x:
            state = self.relu(self.bn(self.conv(step)) + state)
        return state


@kind(call(x(4, 6, 5)), call(x(2, 3, 5)))
class FeaturesLast(nn.Module):
    """Linear over (N, L, F), the norm over L, where L may be F as well."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(5, 6)
        self.bn = nn.BatchNorm1d(6)

    def forward(self, x):
        y = self.fc(x)
        return F.relu(self.bn(y)) if y.size(1) == 6 else F.relu(self.bn(y.transpose(1, 2)))
