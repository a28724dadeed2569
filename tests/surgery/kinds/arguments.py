"""The way depends on what is given: None, types, numbers, names, shapes, how many."""

import enum
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import IMAGE, OTHER, ROWS, SMALL, Base
from .harness import call, kind, x


@kind(call(IMAGE), call(IMAGE, OTHER), call(IMAGE, shortcut=OTHER))
class DefaultNone(Base):
    def forward(self, x, shortcut=None):
        if shortcut is None:
            shortcut = x
        return F.relu(self.bn(self.conv(x)) + shortcut)


@kind(call(IMAGE, OTHER), call(IMAGE), call(IMAGE, None))
class GivenThenNone(Base):
    def forward(self, x, shortcut=None):
        x = self.bn(self.conv(x))
        if shortcut is not None:
            x = x + shortcut
        return self.relu(x)


@kind(call(IMAGE), call(IMAGE, OTHER))
class NoneInsideAnExpression(Base):
    def forward(self, x, skip=None):
        return self.relu(self.bn(self.conv(x)) + (x if skip is None else 2 * skip))


class Mode(enum.Enum):
    PLAIN = 1
    SQUARED = 2


@kind(call(IMAGE), call(IMAGE, Mode.SQUARED), call(IMAGE, mode=Mode.PLAIN))
class EnumArgument(Base):
    def forward(self, x, mode=Mode.PLAIN):
        y = self.bn(self.conv(x))
        if mode is Mode.SQUARED:
            return y * y
        return self.relu(y)


@kind(call(IMAGE), call((IMAGE, OTHER)), call([IMAGE, OTHER]))
class TensorOrTuple(Base):
    def forward(self, x):
        if isinstance(x, tuple | list):
            x, skip = x
        else:
            skip = x
        return self.relu(self.bn(self.conv(x)) + skip)


@kind(call((IMAGE, OTHER)), call(IMAGE))
class TupleThenTensor(Base):
    def forward(self, x):
        if isinstance(x, Tensor):
            return self.bn(x)
        a, b = x
        return self.relu(self.bn(a)) + b


@kind(call(IMAGE), call({"image": OTHER}), call({"image": IMAGE, "mask": OTHER}))
class TensorOrDict(Base):
    def forward(self, x):
        mask = None
        if hasattr(x, "get"):
            mask = x.get("mask")
            x = x["image"]
        y = self.bn(self.conv(x))
        return self.relu(y) if mask is None else y * mask


@kind(call(IMAGE), call(IMAGE, mode="linear"), call(IMAGE, "nothing known"))
class NamedMode(Base):
    def forward(self, x, mode="relu"):
        return {"relu": F.relu, "linear": lambda y: y}.get(mode, torch.tanh)(self.bn(x))


@kind(call(IMAGE), call(IMAGE, extra={"gain": 3.0}), call(IMAGE, extra={"other": 1}))
class DictGet(Base):
    def forward(self, x, extra={}):  # noqa: B006 (a default of others' code)
        return self.relu(self.bn(self.conv(x)) * extra.get("gain", 1.0))


@kind(call(IMAGE), call(IMAGE, OTHER), call(IMAGE, OTHER, OTHER))
class StarArguments(Base):
    def forward(self, x, *more):
        y = self.bn(self.conv(x))
        for other in more:
            y = y + other
        return self.relu(y)


@kind(call(IMAGE), call(IMAGE, scale=2.0), call(IMAGE, skip=OTHER), call(IMAGE, scale=0.5, skip=OTHER))
class StarKeywords(Base):
    def forward(self, x, **options):
        y = self.bn(x) + options.get("skip", 0)
        return self.relu(y * options["scale"]) if "scale" in options else self.relu(y)


@kind(call(IMAGE), call(IMAGE, activate=False), call(IMAGE, activate=0))
class KeywordOnly(Base):
    def forward(self, x, *, activate=True):
        y = self.bn(self.conv(x))
        return F.relu(y) if activate else y


@kind(call(IMAGE), call(x=OTHER), call(input=OTHER))
class PositionalOrKeyword(Base):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


@kind(call(image=IMAGE), call(image=OTHER, skip=IMAGE), must=("convert", "fold"))
class KeywordsOnlyExample(Base):
    def forward(self, image, skip=None):
        y = self.bn(self.conv(image))
        return self.relu(y if skip is None else y + skip)


@kind(call(IMAGE, 1), call(IMAGE, 3), call(IMAGE, 0))
class NumberOfRounds(Base):
    def forward(self, x, rounds):
        for _ in range(rounds):
            x = self.relu(self.bn(self.conv(x)))
        return x


@kind(call(IMAGE, 0.0), call(IMAGE, 0.5))
class NumberTested(Base):
    def forward(self, x, noise):
        y = self.bn(self.conv(x))
        if noise > 0:
            y = y * noise
        return self.relu(y)


@kind(call(IMAGE), call(IMAGE, torch.tanh), call(IMAGE, F.relu), call(IMAGE, act=abs))
class CallableArgument(Base):
    def forward(self, x, act=F.relu):
        return act(self.bn(self.conv(x)))


@kind(call(IMAGE, torch.tensor(1)), call(IMAGE, torch.tensor(-1)))
class TensorDecides(Base):
    def forward(self, x, sign):
        y = self.bn(self.conv(x))
        return self.relu(y) if sign.item() > 0 else -y


@kind(call(IMAGE), call(x(4, 3, 6, 6, at=3, shift=5.0)), call(x(4, 3, 6, 6, at=3, shift=-5.0)))
class ValuesDecide(Base):
    def forward(self, x):
        return self.relu(self.bn(x)) if x.mean() < 1 else self.bn(x) - x


@kind(call(IMAGE), call(x(4, 3, 8, 8)), call(x(2, 3, 6, 9)))
class ShapeDecides(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        if x.shape[-1] > 6:
            y = y[..., :-2] * 2
        return self.relu(y)


@kind(call(IMAGE), call(SMALL), call(x(1, 3, 4, 4)))
class BatchSizeDecides(Base):
    def forward(self, x):
        y = self.bn(x)
        return self.relu(y) if len(x) > 2 else self.relu(y) + x.flip(0)


def _of_rows(self, x):
    return self.relu(self.bn(x.flatten(0, -2))).view(x.shape)


@kind(call(ROWS), call(x(2, 3, 5)))
class DimensionsDecide(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(5, 5)
        self.bn = nn.BatchNorm1d(5)
        self.relu = nn.ReLU()

    def forward(self, x):
        x = self.fc(x)
        if x.dim() == 3:
            return self.relu(self.bn(x.transpose(1, 2)).transpose(1, 2))
        return self.relu(self.bn(x))


@kind(call(IMAGE), call(IMAGE.clone().contiguous(memory_format=torch.channels_last)))
class LayoutDecides(Base):
    def forward(self, x):
        y = self.bn(x)
        return self.relu(y) if x.stride(1) != 1 else y - 1


@kind(call(IMAGE), call((IMAGE * 9).round().to(torch.int64)))
class DtypeDecides(Base):
    def forward(self, x):
        if not x.is_floating_point():
            return self.bn(x.double() / 9)
        return self.relu(self.bn(x))


Pair = namedtuple("Pair", ["image", "skip"])


@kind(call(Pair(IMAGE, OTHER)), call(Pair(OTHER, None)), must=("convert", "fold"))
class NamedTupleInput(Base):
    def forward(self, pair):
        y = self.bn(self.conv(pair.image))
        return self.relu(y if pair.skip is None else y + pair.skip)


@dataclass
class Batch:
    image: Tensor
    skip: Any = None


@kind(call(Batch(IMAGE)), call(Batch(IMAGE, OTHER)))
class DataclassInput(Base):
    def forward(self, batch):
        y = self.bn(self.conv(batch.image))
        return self.relu(y if batch.skip is None else y + batch.skip)


@kind(
    call([IMAGE, OTHER]),
    call([IMAGE]),
    call([IMAGE, OTHER, SMALL.repeat(2, 1, 1, 1).repeat(1, 1, 2, 2)[..., :6, :6]]),
)
class ListOfAnyLength(Base):
    def forward(self, images):
        return [self.relu(self.bn(image)) for image in images]


@kind(call(OrderedDict(a=IMAGE, b=OTHER)), call(OrderedDict(b=IMAGE, a=OTHER)), call(OrderedDict(b=OTHER)))
class OrderDecides(Base):
    def forward(self, images):
        first = next(iter(images))
        return {key: self.relu(self.bn(v)) if key == first else self.bn2(v) for key, v in images.items()}


@kind(
    call(torch.tensor([[0, 2], [1, 4], [3, 3]])),
    call(torch.tensor([[4, 4], [0, 0], [2, 1]])),
    must=("convert", "fold"),
)
class CategoryCodes(nn.Module):
    """Codes beyond the table fail; numbers that surgery invents are beyond it."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.fc = nn.Linear(8, 3)
        self.bn = nn.BatchNorm1d(3)

    def forward(self, codes):
        return F.relu(self.bn(self.fc(self.table(codes).flatten(1))))


@kind(
    call(x(3, 6, 4), torch.tensor([6, 4, 2])),
    call(x(3, 6, 4, at=1), torch.tensor([5, 5, 1])),
    must=("convert", "fold"),
)
class SortedLengths(nn.Module):
    """Lengths must fall from row to row, as for packed sequences."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(4, 3, batch_first=True)
        self.fc = nn.Linear(3, 3)
        self.bn = nn.BatchNorm1d(3)

    def forward(self, values, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(values, lengths, batch_first=True)
        _, last = self.gru(packed)
        return self.bn(self.fc(last[0])).relu()


@kind(call(torch.rand(4, 3, 6, 6).double()), call(torch.zeros(4, 3, 6, 6).double()), must=("convert", "fold"))
class AssertedRange(Base):
    def forward(self, x):
        assert x.min() >= 0
        assert x.max() <= 1, "pixels are between 0 and 1"
        return self.relu(self.bn(self.conv(x)))


@kind(call(x(4, 3).softmax(1)), call(x(4, 3, at=2).softmax(1)), must=("convert", "fold"))
class Probabilities(nn.Module):
    """Checks that each row sums to one."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.bn = nn.BatchNorm1d(4)

    def forward(self, p):
        if not torch.allclose(p.sum(1), torch.ones(len(p), dtype=p.dtype)):
            raise ValueError("each row must sum to one")
        return self.bn(self.fc(p)).relu()


@kind(
    call(x(4, 2), torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])),
    call(x(3, 2), torch.tensor([[0, 1], [2, 2]])),
    must=("convert", "fold"),
)
class GraphEdges(nn.Module):
    """Edges are pairs of indices below the number of nodes."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 4)
        self.bn = nn.BatchNorm1d(4)

    def forward(self, nodes, edges):
        h = self.fc(nodes)
        return self.bn(h.index_add(0, edges[1], h[edges[0]])).relu()


@kind(call(IMAGE), call(IMAGE, None, OTHER), call(IMAGE, OTHER))
class SeveralNones(Base):
    def forward(self, x, a=None, b=None):
        y = self.bn(self.conv(x))
        y = y if a is None else y + a
        y = self.relu(y)
        return self.bn2(y) if b is None else self.bn2(y) + b


@kind(call(IMAGE), call(IMAGE, ("bn2",)), call(IMAGE, ("bn", "bn2")), call(IMAGE, ()))
class NamesOfLayers(Base):
    """The caller says which layers run."""

    def forward(self, x, which=("bn",)):
        for name in which:
            x = self.relu(getattr(self, name)(self.conv(x)))
        return x


@kind(call(IMAGE), call(IMAGE.requires_grad_(False), True))
class FlagTrue(Base):
    def forward(self, x, features=False):
        y = self.bn(self.conv(x))
        z = self.relu(y)
        return (z, y) if features else z
