"""Methods of a module that end in a layer or a norm, and those that call them."""

import types

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .base import IMAGE, OTHER, Base
from .harness import Call, call, kind


@kind(call(IMAGE), call(OTHER), Call((IMAGE,), before=lambda m: setattr(m, "thrifty", True)), twice=True)
class MethodEndsInALayer(Base):
    """As DenseNet is written: another method ends in the convolution, maybe under a checkpoint."""

    thrifty = False

    def narrow(self, xs):
        out = torch.cat(xs)[: len(xs[0])]
        return self.conv(self.relu(self.bn(out)))

    def forward(self, x):
        if self.thrifty:
            out = checkpoint(lambda y: self.narrow([y, y]), x, use_reentrant=False)
        else:
            out = self.narrow([x, x])
        new = self.conv2(self.relu(self.bn2(out)))
        return new.sigmoid()


@kind(call(IMAGE), call(OTHER), Call((IMAGE,), run="norm"), slow=True)
class MethodEndsInANorm(Base):
    def norm(self, x):
        return self.bn(self.conv(x))

    def forward(self, x):
        return self.relu(self.norm(x)) + self.norm(x).mean()


@kind(call(IMAGE), call(OTHER), slow=True)
class TwoMethodsOneLayer(Base):
    """What a method gives is used twice, and read before it is joined."""

    def first(self, x):
        return self.conv(x)

    def second(self, x):
        return self.first(x)

    def forward(self, x):
        y = self.second(x)
        z = self.second(x)
        seen = float(z.abs().max())
        return self.bn(y) + y * min(seen, 1.0), self.bn2(z)


def _replace(model):
    model.first = types.MethodType(lambda self, x: self.conv(x) * 2, model)


@kind(call(IMAGE), Call((IMAGE,), before=_replace), slow=True)
class MethodReplaced(Base):
    """The instance gets another method later."""

    def first(self, x):
        return self.conv(x)

    def forward(self, x):
        return self.relu(self.bn(self.first(x)))


@kind(call(IMAGE), call(OTHER), slow=True)
class MethodOverridden(MethodReplaced):
    def first(self, x):
        return super().first(x) + 1


@kind(call(IMAGE), call(OTHER), slow=True)
class InputChangedAfterTheMethod(Base):
    """What the layer took is changed in place before the norm is called."""

    def first(self, x):
        return self.conv(x)

    def forward(self, x):
        x = x * 2
        y = self.first(x)
        x.add_(1)
        return self.relu(self.bn(y)) + x


@kind(call(IMAGE), call(OTHER), Call((IMAGE,), before=lambda m: setattr(m, "steps", 1)), slow=True)
class MethodInALoop(nn.Module):
    steps = 2

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))

    def one(self, i, x):
        return self.convs[i](x)

    def forward(self, x):
        for i in range(2):
            y = self.one(i, x)
            x = self.norms[i](y).relu() if i < self.steps else y
        return x


@kind(call(IMAGE), call(OTHER), Call((IMAGE,), before=lambda m: setattr(m, "use_norm", False)))
class FlagInTheBlock(Base):
    """As pytorchcv's blocks are written."""

    use_norm = True

    def forward(self, x):
        x = self.conv(x)
        if self.use_norm:
            x = self.bn(x)
        x = self.relu(x)
        return self.conv2(x)


def _another_weight(model):
    model.conv.weight = nn.Parameter(model.conv.weight.detach() * 2)


@kind(
    call(IMAGE),
    call(OTHER),
    Call((IMAGE,), before=lambda m: setattr(m.bn, "eps", 1.0)),
    Call((IMAGE,), before=lambda m: setattr(m.conv, "stride", (2, 2))),
    Call((IMAGE,), before=_another_weight),
)
class SettingsChangedLater(FlagInTheBlock):
    """What the folded weights were made of is another tensor, or is read in another way."""
