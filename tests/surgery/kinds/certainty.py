"""What a fold must not take for certain: the same layers, reached in ways that the example does not show."""

import copy
import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .base import IMAGE, Base, Block
from .harness import Call, call, kind

BOTH = ("convert", "fold")


def _plain_block():
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())


class InSequential(nn.Module):
    """The pair stands in a ``Sequential``."""

    def __init__(self):
        super().__init__()
        self.layers = _plain_block()


@kind(call(IMAGE), call(IMAGE, True), must=BOTH)
class SequentialLeftEarly(InSequential):
    def forward(self, x, early=False):
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if early and i == 0:
                return x
        return x


@kind(call(IMAGE), call(IMAGE, 1), call(IMAGE, 2), must=BOTH)
class SequentialCut(InSequential):
    def forward(self, x, depth=None):
        return self.layers(x) if depth is None else self.layers[:depth](x)


@kind(call(IMAGE), call(IMAGE, ("0",)), must=BOTH)
class SequentialTapped(InSequential):
    """Features of a perceptual loss, by name."""

    def forward(self, x, wanted=()):
        taps = []
        for name, layer in self.layers.named_children():
            x = layer(x)
            if name in wanted:
                taps.append(x * 1)
        return x, taps


def _first_of(network, x):
    return network.conv(x)


@kind(call(IMAGE), call(IMAGE, True), must=BOTH)
class HandedToAFunction(Base):
    def forward(self, x, features=False):
        return _first_of(self, x) if features else self.relu(self.bn(self.conv(x)))


def _first_of_a_block(block, x):
    return block.conv(x)


@kind(call(IMAGE), call(IMAGE, True), must=BOTH)
class BlockHandedToAFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x, features=False):
        return _first_of_a_block(self.block, x) if features else self.block(x)


@kind(call(IMAGE), call(IMAGE, True), must=BOTH)
class PartsOfBlocksInALoop(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x, linear=False):
        for block in self.blocks:
            x = block.conv(x) if linear else block(x)
        return x


@kind(call(IMAGE), call(IMAGE, True), must=BOTH)
class OutputReadLater(Base):
    def forward(self, x, aux=False):
        y = self.conv(x)
        z = self.relu(self.bn(y))
        if aux:
            z = z + y.mean()
        return z


@kind(call(IMAGE), call(IMAGE, False), must=BOTH)
class OutputReadAfterAnEarlyReturn(Base):
    def forward(self, x, quick=True):
        y = self.conv(x)
        z = self.bn(y)
        if quick:
            return z
        return z - y


@kind(call(IMAGE), call(IMAGE, True), must=BOTH)
class OutputListed(Base):
    def forward(self, x, tapped=False):
        taps = []
        y = self.conv(x)
        taps.append(y)
        z = self.bn(y)
        return (z, taps) if tapped else z


@kind(call(IMAGE), call(IMAGE, True), must=BOTH)
class OutputNamedWithin(Base):
    def forward(self, x, aux=False):
        z = self.bn(y := self.conv(x))
        return z + y if aux else z


@kind(call(IMAGE), call(IMAGE, True), must=BOTH)
class OutputReadByAnInnerFunction(Base):
    def forward(self, x, aux=False):
        y = self.conv(x)

        def beside():
            return y.square()

        z = self.bn(y)
        return z + beside() if aux else z


@kind(call(IMAGE), call(IMAGE, 2.0), must=BOTH)
class FunctionBetween(Base):
    """A function of the model's own stands between, and does nothing on the example."""

    def forward(self, x, gain=None):
        return self.relu(self.bn(_scaled(self.conv(x), gain)))


def _scaled(y, gain):
    return y if gain is None else y * gain


@kind(call(IMAGE), Call((IMAGE,), before=lambda m: setattr(m, "gain", 3.0)), must=BOTH)
class MethodBetween(Base):
    gain = None

    def scaled(self, y):
        return y if self.gain is None else y * self.gain

    def forward(self, x):
        y = self.conv(x)
        y = self.scaled(y)
        return self.relu(self.bn(y))


class Switched(nn.Module):
    on = False

    def forward(self, x):
        return x.abs() if self.on else x


@kind(call(IMAGE), Call((IMAGE,), before=lambda m: setattr(m[1], "on", True)), must=BOTH)
def module_between():
    return nn.Sequential(nn.Conv2d(3, 3, 1), Switched(), nn.BatchNorm2d(3))


@kind(call(IMAGE), Call((IMAGE,), before=lambda m: setattr(m.switch, "on", True)), must=BOTH)
class ModuleBetweenInCode(Base):
    def __init__(self):
        super().__init__()
        self.switch = Switched()

    def forward(self, x):
        return self.bn(self.switch(self.conv(x)))


@kind(call(IMAGE), call(IMAGE, True), must=BOTH)
class HeldInAList(Base):
    def __init__(self):
        super().__init__()
        self.first = [self.conv]

    def forward(self, x, linear=False):
        if linear:
            for layer in self.first:
                x = layer(x)
            return x
        return self.bn(self.conv(x))


@kind(call(IMAGE), call(IMAGE, True), must=BOTH)
class HeldByAPartial(Base):
    def __init__(self):
        super().__init__()
        self.embed = functools.partial(nn.Module.__call__, self.conv)

    def forward(self, x, linear=False):
        return self.embed(x) if linear else self.bn(self.conv(x))


class GainedNorm(nn.BatchNorm2d):
    """Another library's norm that changes what it is given, on a setting."""

    gain = None

    def forward(self, x):
        if self.gain is not None:
            x = x * self.gain
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )


@kind(call(IMAGE), Call((IMAGE,), before=lambda m: setattr(m[1], "gain", 2.0)), must=BOTH)
def norm_that_scales_on_a_setting():
    return nn.Sequential(nn.Conv2d(3, 3, 1), GainedNorm(3))


class GainedConvolution(nn.Conv2d):
    gain = None

    def forward(self, x):
        return _scaled(super().forward(x), self.gain)


@kind(call(IMAGE), Call((IMAGE,), before=lambda m: setattr(m[0], "gain", 2.0)), must=BOTH)
def convolution_that_scales_on_a_setting():
    return nn.Sequential(GainedConvolution(3, 3, 1), nn.BatchNorm2d(3))


class Standardised(nn.Conv2d):
    """Weight standardisation on a setting, under the forward of torch's."""

    standard = False

    def _conv_forward(self, x, weight, bias):
        y = super()._conv_forward(x, weight, bias)
        return y - y.mean((2, 3), keepdim=True) if self.standard else y


@kind(call(IMAGE), Call((IMAGE,), before=lambda m: setattr(m[0], "standard", True)), must=BOTH)
def convolution_with_its_own_inside():
    return nn.Sequential(Standardised(3, 3, 1), nn.BatchNorm2d(3))


@kind(call(IMAGE), call(IMAGE, True), must=BOTH)
class WeightsGiven(Base):
    """``functional_call`` with the layer's own weights, made larger."""

    def forward(self, x, doubled=False):
        if doubled:
            weights = {name: 2 * p.detach() for name, p in self.conv.named_parameters()}
            return self.relu(torch.func.functional_call(self.conv, weights, (x,)))
        return self.relu(self.bn(self.conv(x)))


@kind(call(IMAGE), call(IMAGE, True), must=BOTH)
class PenaltyOfAMethod(Base):
    def penalty(self):
        return self.conv.weight.square().sum()

    def forward(self, x, penalised=False):
        y = self.relu(self.bn(self.conv(x)))
        return (y, self.penalty()) if penalised else y


class Ends(nn.Module):
    """A block whose last layer is a convolution, and which may end earlier."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, short=False):
        x = self.one(x)
        if short:
            return x
        return self.two(x)


@kind(call(IMAGE), call(IMAGE, True), must=BOTH)
class BlockThatMayEndEarlier(Base):
    def __init__(self):
        super().__init__()
        self.conv = Ends()

    def forward(self, x, short=False):
        return self.bn(self.conv(x, short))


@kind(call(IMAGE), Call((IMAGE,), run="embed"), must=BOTH)
class CheckpointedConvolution(Base):
    """The pair in two calls of a function that keeps no activations, or the first of them alone."""

    def embed(self, x):
        return checkpoint(self.conv, x, use_reentrant=False)

    def forward(self, x):
        return self.bn(self.embed(x))


@kind(call(IMAGE), call(IMAGE, True), must=BOTH)
class CopiedOnAnotherWay(Base):
    def forward(self, x, detached=False):
        if detached:
            return copy.deepcopy(self.conv)(x)
        return self.bn(self.conv(x))


@kind(call(IMAGE), call(IMAGE, True), must=BOTH)
class ByTwoArgumentGetattr(Base):
    def forward(self, x, linear=False):
        return getattr(self, "conv")(x) if linear else self.bn(self.conv(x))  # noqa: B009 (the kind is this)


@kind(call(IMAGE), call(IMAGE, False), must=BOTH)
class ActivationOnACondition(Base):
    """A convolution that may be packed, and an activation that may not run."""

    def forward(self, x, active=True):
        y = self.bn(self.conv(x))
        return self.relu(y) if active else y


@kind(call(IMAGE), Call((IMAGE,), before=lambda m: setattr(m, "active", False)), must=BOTH)
class ActivationOnAnAttribute(Base):
    active = True

    def forward(self, x):
        y = self.conv(x)
        return self.relu(y) if self.active else y


@kind(call(IMAGE), Call((IMAGE,), before=lambda m: setattr(m[1], "on", True)), must=BOTH)
def module_between_convolution_and_activation():
    return nn.Sequential(nn.Conv2d(3, 3, 1), Switched(), nn.ReLU())
