"""What comes out: tuples, dictionaries, dataclasses, objects, nothing; the very object that went in."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import IMAGE, OTHER, Base
from .harness import call, kind


@dataclass
class Output:
    features: Tensor
    loss: Any = None


@kind(call(IMAGE), call(IMAGE, OTHER))
class GivesDataclass(Base):
    """Its tensors are easily missed by a comparison; the second call goes another way."""

    def forward(self, x, target=None):
        y = self.relu(self.bn(self.conv(x)))
        return Output(y, None if target is None else F.mse_loss(y, target))


@kind(call(IMAGE), call(IMAGE, 2.0))
class DataclassOfADefault(Base):
    def forward(self, x, scale=None):
        if scale is None:
            scale = 1.0
        return Output(self.relu(self.bn(self.conv(x)) * scale))


Named = namedtuple("Named", ["features", "norm"])


@kind(call(IMAGE), call(OTHER))
class GivesNamedTuple(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return Named(self.relu(y), y.mean())


class Attributes(OrderedDict):
    """A dictionary with attributes, like transformers' ModelOutput."""

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(name)

    def to_tuple(self):
        return tuple(self.values())


class Answer(Attributes):
    pass


@kind(call(IMAGE), call(IMAGE, return_dict=False), call(OTHER, True))
class GivesOrderedDictSubclass(Base):
    def forward(self, x, return_dict=True):
        y = self.relu(self.bn(self.conv(x)))
        return Answer(logits=y.mean((2, 3)), features=y) if return_dict else (y,)


@kind(call(IMAGE), call(OTHER))
class SubclassPassedOn(nn.Module):
    """The outer module reads attributes of what the inner one gives."""

    def __init__(self):
        super().__init__()
        self.inner = GivesOrderedDictSubclass()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        out = self.inner(x)
        return Answer(last=F.relu(self.bn(out.features)), **out)


class Result:
    def __init__(self, value, parts):
        self.value, self.parts = value, parts


@kind(call(IMAGE), call(OTHER))
class GivesObject(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return Result(self.relu(y), [y, {"deep": (y * 2,)}])


@kind(call(IMAGE), call(OTHER))
class GivesNamespace(Base):
    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        return SimpleNamespace(y=y, size=y.shape, dtype=str(y.dtype), name=type(self).__bases__[0].__name__)


@kind(call(IMAGE), call(OTHER))
class GivesNested(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return {"a": [self.relu(y), (None, "text", 3)], "b": {"c": y.shape}, 4: True}


@kind(call(IMAGE), call(OTHER))
class GivesNothing(Base):
    result = None

    def forward(self, x):
        self.result = self.relu(self.bn(self.conv(x)))


@kind(call(IMAGE), call(OTHER))
class GivesNumber(Base):
    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        return float(y.detach().sum()), y.detach().numpy()


@kind(call(IMAGE), call(OTHER))
class TensorWithAttribute(Base):
    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        y.scale = 2.0
        return y


@kind(call(IMAGE), call(OTHER))
class SameObjectTwice(Base):
    """A caller may write to one and see it in the other."""

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        return y, [y]

    def __call__(self, x):
        a, b = super().__call__(x)
        b[0] = "shared" if a is b[0] else "copied"
        return a, b


@kind(call(IMAGE), call(OTHER))
class GivesWhatItGot(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        x += self.relu(y)
        return x


@kind(call(IMAGE), call(OTHER))
class AliasOfOutput(Base):
    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        return y, y.view(len(y), -1), y[:1]


@kind(call(IMAGE), call(OTHER))
class GivesTheNormToo(Base):
    """A hidden state is the tensor that an in-place activation then writes to."""

    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu_(y), y


@kind(call(IMAGE), call(OTHER), never=("fold",))
class GivesFunction(Base):
    """A function that calls layers later."""

    def forward(self, x):
        y = self.conv(x)
        return lambda: self.relu(self.bn(y))

    def __call__(self, x):
        return super().__call__(x)()


@kind(call(IMAGE), call(OTHER))
class GivesGenerator(Base):
    def forward(self, x):
        yield self.relu(self.bn(self.conv(x)))
        yield self.bn2(x)

    def __call__(self, x):
        return list(super().__call__(x))


class Tagged(Tensor):
    """A subclass of Tensor."""


@kind(call(IMAGE), call(OTHER))
class GivesTensorSubclass(Base):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x))).as_subclass(Tagged)


@kind(call(IMAGE), call(OTHER))
class SubclassInside(Base):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x.as_subclass(Tagged))))


@kind(call(IMAGE), call(OTHER))
class LossInTraining(Base):
    """Detectors give losses in training and predictions in evaluation."""

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        if self.training:
            return {"loss": y.square().mean()}
        return [{"boxes": one.flatten()[:4], "label": int(one.sum() > 0)} for one in y]


@kind(call(IMAGE), call(OTHER))
class DeepSupervision(Base):
    def forward(self, x):
        a = self.relu(self.bn(self.conv(x)))
        b = self.relu(self.bn2(self.conv2(a)))
        return (b, [a]) if self.training else b


@kind(call(IMAGE), call(OTHER))
class SideOutput(Base):
    """The output is a tuple made of a list that was filled on the way."""

    def forward(self, x):
        outs = []
        for conv, norm in ((self.conv, self.bn), (self.conv2, self.bn2)):
            x = norm(conv(x))
            outs.append(x)
            x = F.relu(x)
        outs.append(torch.stack([o.mean() for o in outs]))
        return tuple(outs)
