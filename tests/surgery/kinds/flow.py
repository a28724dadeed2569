"""The way depends on Python: early returns, loops, errors caught, look-ups, things set elsewhere."""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch import nn

from .base import IMAGE, OTHER, SMALL, Base, Block
from .harness import Call, call, kind, x

SETTINGS = {"act": "relu"}
ACTIVATE = True


@kind(call(IMAGE), call(IMAGE, True), call(OTHER, early=True))
class EarlyReturn(Base):
    def forward(self, x, early=False):
        y = self.bn(self.conv(x))
        if early:
            return y
        return self.relu(y)


@kind(call(IMAGE), call(x(2, 5, 4, 4)))
class TryExcept(Base):
    """Another number of channels fails in the convolution and is served otherwise."""

    def forward(self, x):
        try:
            return self.relu(self.bn(self.conv(x)))
        except RuntimeError:
            return self.bn2(x[:, :3])


@kind(call(IMAGE), call(IMAGE, OTHER))
class TryAttribute(Base):
    def forward(self, x, skip=None):
        y = self.bn(self.conv(x))
        try:
            y = y + skip.mul(2)
        except AttributeError:
            y = y + x
        return self.relu(y)


@kind(call(IMAGE), call(OTHER - 9), call(OTHER + 9))
class Walrus(Base):
    def forward(self, x):
        if (y := self.bn(x)).mean() > 0.3:
            return y
        return self.relu(y)


@kind(call(IMAGE), call(SMALL))
class WhileLoop(Base):
    def forward(self, x):
        while x.size(-1) > 3:
            x = F.avg_pool2d(self.relu(self.bn(self.conv(x))), 2)
        return x


@kind(call(IMAGE), call(IMAGE, 1), call(IMAGE, 0), call(IMAGE, -1))
class Recursion(Base):
    def forward(self, x, depth=2):
        if depth <= 0:
            return x
        return self.forward(self.relu(self.bn(self.conv(x)) + x), depth - 1)


class _Many(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))
        self.acts = nn.ModuleList([nn.ReLU(), nn.Identity(), nn.Sigmoid()])


@kind(call(IMAGE), call(OTHER))
class ZippedLists(_Many):
    def forward(self, x):
        for conv, norm, act in zip(self.convs, self.norms, self.acts, strict=True):
            x = act(norm(conv(x)))
        return x


@kind(call(IMAGE), call(IMAGE, stop=1), call(IMAGE, stop=2))
class Enumerated(_Many):
    def forward(self, x, stop=None):
        for i, conv in enumerate(self.convs):
            x = self.norms[i](conv(x))
            if i == stop:
                break
            x = F.relu(x)
        return x


@kind(call(IMAGE), call(IMAGE, "b"), call(IMAGE, "a"), call(IMAGE, "c"))
class ModuleDictByKey(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict({"a": Block(), "b": nn.BatchNorm2d(3)})
        self.relu = nn.ReLU()

    def forward(self, x, head="a"):
        return self.relu(self.heads[head](x))


@kind(call(IMAGE), call(IMAGE, 2), call(IMAGE, 1))
class GetattrByName(Base):
    """``bn`` or ``bn2`` by a number."""

    def forward(self, x, which=""):
        which = "" if which == 1 else which
        return self.relu(getattr(self, f"bn{which}")(self.conv(x)))


@kind(call(IMAGE), call(IMAGE, 1), call(IMAGE, 2))
class DomainNorms(nn.Module):
    """One batch norm a domain, behind one convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x, domain=0):
        return self.norms[domain](self.conv(x)).relu()


@kind(call(IMAGE), Call((IMAGE,), before=lambda m: setattr(m, "domain", 1)))
class DomainByAttribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.domain = 0

    def forward(self, x):
        return self.norms[self.domain](self.conv(x)).relu()


@kind(call(IMAGE), call(x(4, 3, 6, 6, at=4), [0, 1, 1, 0]))
class SwitchablePerSample(nn.Module):
    """Each sample of a batch goes to a norm of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

    def forward(self, x, domains=(0, 0, 0, 0)):
        y = self.conv(x)
        out = torch.zeros_like(y)
        index = torch.tensor(domains)
        for d in set(domains):
            out[index == d] = self.norms[d](y[index == d]).relu()
        return out


def _put_global(value):
    def put(_model):
        globals()["ACTIVATE"] = value

    return put


@kind(
    call(IMAGE),
    Call((IMAGE,), before=_put_global(False)),
    reset=lambda: _put_global(True)(None),
)
class ModuleGlobal(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y) if ACTIVATE else y


@kind(
    call(IMAGE),
    Call((IMAGE,), before=lambda m: SETTINGS.update(act="none")),
    reset=lambda: SETTINGS.update(act="relu"),
)
class GlobalDictionary(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y) if SETTINGS["act"] == "relu" else y * 2


@kind(call(IMAGE), Call((IMAGE,), before=lambda m: setattr(m, "gain", 3.0)))
class AttributeChangedLater(Base):
    gain = 1.0

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)) * self.gain)


class _Switch(Base):
    linear = False

    def forward(self, x):
        y = self.bn(self.conv(x))
        return y if self.linear else self.relu(y)


@kind(
    call(IMAGE),
    Call((IMAGE,), before=lambda m: setattr(_Switch, "linear", True)),
    reset=lambda: setattr(_Switch, "linear", False),
)
class ClassAttributeChangedLater(_Switch):
    pass


@kind(call(IMAGE), Call((IMAGE,), before=lambda m: m.options.update(act=False)))
class OptionsDictionary(Base):
    def __init__(self):
        super().__init__()
        self.options = {"act": True}

    def forward(self, x):
        y = self.bn(x)
        return F.relu(y) if self.options["act"] else y


@kind(call(IMAGE), Call((IMAGE,), before=lambda m: setattr(m, "_slope", 0.7)))
class Property(Base):
    _slope = 0.1

    @property
    def slope(self):
        return self._slope

    def forward(self, x):
        return F.leaky_relu(self.bn(x), self.slope)


@kind(call(IMAGE), Call((IMAGE,), before=lambda m: m.extras.update(scale=-1.0)))
class MissingAttribute(Base):
    """Attributes come from a dictionary, by ``__getattr__``."""

    def __init__(self):
        super().__init__()
        self.extras = {"scale": 1.0}

    def __getattr__(self, name):
        extras = self.__dict__.get("extras", {})
        return extras[name] if name in extras else super().__getattr__(name)

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)) * self.scale)


@kind(call(IMAGE), Call((IMAGE,), before=lambda m: setattr(m, "extra", nn.Tanh())))
class HasAttribute(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.extra(y) if hasattr(self, "extra") else self.relu(y)


def _doubled(forward):
    @functools.wraps(forward)
    def wrapped(self, x, twice=False):
        y = forward(self, x)
        return 2 * y if twice else y

    return wrapped


@kind(call(IMAGE), call(IMAGE, True), call(IMAGE, twice=True))
class Decorated(Base):
    @_doubled
    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


@kind(call(IMAGE), Call((IMAGE,), before=lambda m: m.choose(torch.sigmoid)))
class Closure(Base):
    def __init__(self):
        super().__init__()
        self.choose(F.relu)

    def choose(self, act):
        self.act = lambda y: act(y)

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


@kind(call(IMAGE), call(OTHER))
class LambdaActivation(Base):
    def __init__(self):
        super().__init__()
        self.act = lambda y: F.relu(y) - 0.1

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


@kind(call(IMAGE), call(IMAGE, 1), call(IMAGE, 3))
class GeneratorInside(Base):
    def _rounds(self, x, n):
        for _ in range(n):
            x = self.bn(self.conv(x))
            yield self.relu(x)

    def forward(self, x, n=2):
        return list(self._rounds(x, n))


@kind(call(IMAGE, "a"), call(IMAGE, "b"), call(IMAGE, 7))
class MatchStatement(Base):
    def forward(self, x, what):
        y = self.bn(self.conv(x))
        match what:
            case "a":
                return self.relu(y)
            case int(n):
                return y * n
            case _:
                return self.bn2(y)


@kind(call(IMAGE), call(torch.full((4, 3, 6, 6), float("nan")).double()))
class NotFinite(Base):
    """What is not finite is caught before the norm."""

    def forward(self, x):
        if not torch.isfinite(x).all():
            x = torch.nan_to_num(x)
            return self.bn(x)
        return self.relu(self.bn(x))


@kind(call(IMAGE), call(x(4, 2, 6, 6)))
class RaisesForSome(Base):
    def forward(self, x):
        if x.size(1) != 3:
            raise KeyError(f"{x.size(1)} channels")
        return self.relu(self.bn(x))


@kind(call(IMAGE), call(IMAGE, OTHER))
class ShortCircuit(Base):
    def forward(self, x, skip=None):
        skip = 0.5 if skip is None else skip.mean()
        y = self.bn(self.conv(x))
        return self.relu(y) if skip is not None and skip > 0 else y


@kind(call(IMAGE), Call((IMAGE,), around=torch.no_grad), Call((IMAGE,), around=torch.inference_mode))
class GradModeDecides(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.relu(y) if torch.is_grad_enabled() else y * 3


@kind(call(IMAGE), call(OTHER))
class RequiresGradDecides(Base):
    def forward(self, x):
        y = self.bn(x)
        return self.relu(y) if y.requires_grad else y


@kind(call(IMAGE), call(OTHER))
class TrainingDecides(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.relu(y) if self.training else (y - 1).relu()


@kind(
    call(IMAGE),
    Call((IMAGE,), before=lambda m: m.part.eval()),
    Call((IMAGE,), before=lambda m: m.part.bn.eval()),
)
class ChildsModeDecides(Base):
    def __init__(self):
        super().__init__()
        self.part = Block()

    def forward(self, x):
        y = self.bn(self.conv(x))
        y = self.relu(y) if self.part.training else y
        return self.part(y) + self.part.bn.training


@kind(call(IMAGE), call(IMAGE, slice(1, None)), call(IMAGE, slice(0, 0)))
class SliceOfList(_Many):
    def forward(self, x, part=slice(0, 2)):
        for conv, norm in list(zip(self.convs, self.norms, strict=True))[part]:
            x = F.relu(norm(conv(x)))
        return x


@kind(call(IMAGE), call(OTHER))
class SuppressedError(Base):
    def forward(self, x):
        y = self.bn(x)
        with contextlib.suppress(ValueError):
            if y.mean() > 0:
                raise ValueError
            y = self.relu(y)
        return y
