"""Weights that a fold would change: who else reads them, and ways on which they are needed as they were."""

import torch
import torch.nn.functional as F
from torch import nn

from .base import IMAGE, OTHER, ROWS, Base
from .harness import Call, call, kind, x

BOTH = ("convert", "fold")


class _Way(Base):
    """The convolution with or without the norm behind it, and the norm with or without the convolution."""

    def forward(self, x, way="both"):
        if way == "norm":
            return self.relu(self.bn(x))
        y = self.conv(x)
        return y if way == "convolution" else self.relu(self.bn(y))


@kind(call(IMAGE), call(IMAGE, "convolution"), call(IMAGE, "norm"), must=BOTH)
class EachAlone(_Way):
    pass


@kind(call(IMAGE, "convolution"), call(IMAGE), must=BOTH)
class ConvolutionSeenAlone(_Way):
    pass


@kind(call(IMAGE), Call((IMAGE,), run=lambda m, x: m(x, way="norm")), must=BOTH)
class NormAloneByKeyword(_Way):
    pass


@kind(call(IMAGE), call(OTHER), must=BOTH)
class WeightThroughAFunction(Base):
    """``F.conv2d`` on the module's weight, beside a call of the module."""

    def forward(self, x):
        y = F.conv2d(x, self.conv.weight, self.conv.bias, padding=1)
        return self.relu(self.bn(self.conv(x))) + y


@kind(call(IMAGE), call(OTHER), must=BOTH)
class WeightTransposed(Base):
    """A decoder with the encoder's weights, transposed (tied autoencoder)."""

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        return F.conv_transpose2d(y, self.conv.weight, padding=1)


@kind(call(IMAGE), call(IMAGE, True), must=BOTH)
class WeightOnAnotherWay(Base):
    """The second reader of the weight runs on another way than the example's."""

    def forward(self, x, penalty=False):
        y = self.relu(self.bn(self.conv(x)))
        return (y, self.conv.weight.square().sum()) if penalty else y


@kind(call(IMAGE), call(IMAGE, 1), must=BOTH)
class SharedOnAnotherWay(Base):
    """Another layer with the same weight runs on another way."""

    def __init__(self):
        super().__init__()
        self.twin = nn.Conv2d(3, 3, 3, padding=1)
        self.twin.weight = self.conv.weight

    def forward(self, x, way=0):
        return self.twin(x) if way else self.relu(self.bn(self.conv(x)))


@kind(call(IMAGE), call(x(4, 3, 9, 9)), must=BOTH)
class SizeChoosesTheNorm(Base):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if y.shape[-1] < 8 else self.bn2(y)


@kind(call(IMAGE), call(x(1, 3, 6, 6)), must=BOTH)
class BatchOfOneSkipsTheNorm(Base):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if len(y) > 1 else y


@kind(call(IMAGE), Call((IMAGE,), before=lambda m: setattr(m, "tuned", True)), must=BOTH)
class AttributeSkipsTheNorm(Base):
    tuned = False

    def forward(self, x):
        y = self.conv(x)
        return y if self.tuned else self.bn(y)


@kind(call(IMAGE), Call((IMAGE,), run="features"), Call((OTHER,), run="logits"), must=BOTH)
class MethodSkipsTheNorm(Base):
    def features(self, x):
        return self.conv(x)

    def logits(self, x):
        return self.bn(x)

    def forward(self, x):
        return self.logits(self.features(x))


@kind(call(IMAGE), call(IMAGE * 1e6), call(IMAGE * 1e-6), must=BOTH)
class MagnitudeSkipsTheNorm(Base):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if y.abs().max() < 1e3 else y


@kind(call(IMAGE), call(OTHER), must=BOTH)
class NormBeforePadding(Base):
    """Behind the norm stands a convolution that pads with zeros: its border sees no shift."""

    def forward(self, x):
        return self.conv(self.bn(x))


@kind(call(IMAGE), call(OTHER), must=BOTH)
class NormBeforeReflection(Base):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")

    def forward(self, x):
        return self.conv(self.bn(x))


@kind(call(IMAGE), call(x(4, 3, 7, 7)), must=BOTH)
class NormBeforePoolBeforeLinear(nn.Module):
    """An average that counts its padding stands between."""

    def __init__(self):
        super().__init__()
        self.bn, self.fc = nn.BatchNorm2d(3), nn.Linear(3, 2)
        self.pool = nn.AvgPool2d(3, 2, 1)

    def forward(self, x):
        return self.fc(self.pool(self.bn(x)).amax((2, 3)))


@kind(call(IMAGE), call(IMAGE, 2), call(IMAGE, 1), must=BOTH)
class GroupsAndDilation(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 6, 3, groups=3, dilation=2, padding=2), nn.BatchNorm2d(6)
        self.b, self.bn2 = nn.ConvTranspose2d(6, 6, 2, stride=2, groups=2), nn.BatchNorm2d(6)

    def forward(self, x, scale=None):
        y = F.relu(self.bn(self.a(x)))
        if scale is None:
            return self.bn2(self.b(y))
        return self.bn2(self.b(y, output_size=[12, 12]) * scale)


@kind(call(x(4, 6, 5)), call(x(2, 6, 5, at=3)), must=BOTH)
class LengthEqualsFeatures(nn.Module):
    """Linear makes as many features as there are steps, and the norm is over the steps."""

    def __init__(self):
        super().__init__()
        self.fc, self.bn = nn.Linear(5, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        return self.bn(self.fc(x))


@kind(call(ROWS), call(x(6, 5, at=1)), must=BOTH)
class StrangeStatistics(nn.Module):
    """A scale of zero, a variance of zero, a large mean."""

    def __init__(self):
        super().__init__()
        self.fc, self.bn = nn.Linear(5, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        with torch.no_grad():
            self.bn.weight[0] = 0.0
        return self.bn(self.fc(x))


@kind(call(IMAGE), call(OTHER), must=("convert",))
class BiasAddedOutside(Base):
    """The convolution's bias is read by the model itself."""

    def forward(self, x):
        y = self.bn(F.conv2d(x, self.conv.weight, padding=1) + self.conv.bias.view(1, -1, 1, 1))
        return self.relu(y)


@kind(call(IMAGE), call(OTHER), must=BOTH)
class OutputKeptBeforeTheNorm(Base):
    def forward(self, x):
        raw = self.conv(x)
        return self.relu(self.bn(raw)), raw


@kind(call(IMAGE), call(OTHER), must=BOTH)
class OutputWrittenBeforeTheNorm(Base):
    def forward(self, x):
        y = self.conv(x)
        y[:, :, 0] = 1.0
        return self.relu(self.bn(y))


@kind(call(IMAGE), call(OTHER), must=BOTH)
class OutputKeptInAnAttribute(Base):
    """A later part of the model reads the convolution's output from an attribute."""

    kept = None

    def forward(self, x):
        y = self.conv(x)
        self.kept = [y.detach()]
        z = self.relu(self.bn(y))
        return z * self.kept[0].mean()


@kind(call(IMAGE), call(OTHER), must=("convert",))
class HookReadsTheConvolution(Base):
    """A hook that is there from the start keeps what the convolution gives."""

    def __init__(self):
        super().__init__()
        self.conv.register_forward_hook(_keep)

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        return y + self.conv.kept


def _keep(module, _given, out):
    module.kept = out.detach().mean()


@kind(call(IMAGE), call(OTHER), must=("convert",))
class TupleBetween(Base):
    """The norm's input comes out of a part that gives several things."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            y = self.conv(x)
            return {"y": y, "size": y.shape, "sum": y.sum()}

    def __init__(self):
        super().__init__()
        self.part = self.Part()

    def forward(self, x):
        found = self.part(x)
        return self.relu(self.bn(found["y"])) + found["sum"]
