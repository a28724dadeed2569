"""Where a method's code is, and what its class is: for surgery that reads or replaces either."""

import copy
import importlib.util
import linecache
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .base import IMAGE, OTHER, Base, Block
from .harness import Call, call, kind

SEEN = []


@kind(call(IMAGE), call(OTHER))
class PrivateNames(nn.Module):
    """Names with two underscores are those of the class that they are written in."""

    def __init__(self):
        super().__init__()
        self.__bn = nn.BatchNorm2d(3)
        self.__gain = 2.0

    def __scaled(self, y):
        return y * self.__gain

    def forward(self, x):
        return self.__scaled(F.relu(self.__bn(x)))


@kind(call(IMAGE), call(OTHER))
class LambdaForward(Base):
    forward = lambda self, x: F.relu(self.bn(self.conv(x)))  # noqa: E731


def _outside(self, x):
    return self.relu(self.bn(self.conv(x)))


@kind(call(IMAGE), call(OTHER))
class ForwardFromElsewhere(Base):
    forward = _outside


@kind(call(IMAGE), call(OTHER), reset=SEEN.clear, outside=lambda: list(SEEN), must=())
class MutableDefault(Base):
    """The default is one object for all calls."""

    def forward(self, x, seen=SEEN):
        seen.append(tuple(x.shape))
        return self.relu(self.bn(self.conv(x)) * len(seen))


class _Defaults(Base):
    def forward(self, x, gain=1.0):
        return self.relu(self.bn(self.conv(x)) * gain)


def _put_defaults(*values):
    _Defaults.forward.__defaults__ = values


@kind(
    call(IMAGE),
    Call((IMAGE,), before=lambda m: _put_defaults(3.0), fold=False),
    reset=lambda: _put_defaults(1.0),
)
class DefaultsChanged(_Defaults):
    pass


class _Counted(Base):
    def forward(self, x):
        _Counted.forward.calls = getattr(_Counted.forward, "calls", 0) + 1
        return self.relu(self.bn(self.conv(x)))


def _forget():
    vars(_Counted.forward).clear()


@kind(call(IMAGE), call(OTHER), reset=_forget, outside=lambda: dict(vars(_Counted.forward)))
class AttributeOfTheFunction(_Counted):
    pass


def _with_a_cell():
    gain = 1.0

    def put(value):
        nonlocal gain
        gain = value

    class Inner(Base):
        def forward(self, x):
            return self.relu(self.bn(self.conv(x)) * gain)

    return Inner, put


_Inner, _put_gain = _with_a_cell()


@kind(
    call(IMAGE),
    Call((IMAGE,), before=lambda m: _put_gain(3.0)),
    reset=lambda: _put_gain(1.0),
)
def free_variable_changed():
    return _Inner()


_SOURCE = """from torch import nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(x)) {sign} x
"""
_LOADED = []


def _loaded():
    """A class whose file has other code by now than when it was imported."""
    if not _LOADED:
        folder = tempfile.TemporaryDirectory()
        path = Path(folder.name) / "of_a_file_that_changed.py"
        path.write_text(_SOURCE.format(sign="+"), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        path.write_text(_SOURCE.format(sign="-"), encoding="utf-8")
        linecache.checkcache(str(path))
        _LOADED.extend((module.Network, folder))
    return _LOADED[0]


@kind(call(IMAGE), call(OTHER))
def file_changed_since():
    return _loaded()()


def _without_source():
    scope = {"nn": nn, "F": F}
    exec(
        "def forward(self, x):\n    return F.relu(self.bn(self.conv(x)))\n",
        scope,
    )
    return type("Made", (Base,), {"forward": scope["forward"]})


_Made = _without_source()


@kind(call(IMAGE), call(OTHER))
def no_source():
    return _Made()


class _Parent(Base):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


class _Kid(_Parent):
    pass


def _no_forward():
    if "forward" in vars(_Kid):
        del _Kid.forward


@kind(
    call(IMAGE),
    Call((IMAGE,), before=lambda m: setattr(_Kid, "forward", lambda self, x: self.bn(x) - 1), fold=False),
    reset=_no_forward,
)
class ForwardReplacedOnASubclass(_Kid):
    """The method is found in a base, and a class between gets its own."""


@kind(call(IMAGE), Call((IMAGE,), before=lambda m: setattr(m, "branch", m.bn2), fold=False))
class MethodReplacedOnTheInstance(Base):
    def branch(self, x):
        return self.bn(self.conv(x))

    def forward(self, x):
        return self.relu(self.branch(x))


@kind(call(IMAGE), call(OTHER))
class ExactTypeOfAChild(nn.Module):
    """The parent looks for children of one class."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Block(), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())

    def forward(self, x):
        for child in self.children():
            if type(child) is Block:
                x = child(x)
            elif type(child) is nn.Sequential:
                x = x + child(x)
        return x


@kind(call(IMAGE), call(OTHER))
class NameOfAChildsClass(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = Block()

    def forward(self, x):
        y = self.a(x)
        return y * 2 if self.a.__class__.__name__ == "Block" else y


def _named(module):
    return type(module).__name__


@kind(call(IMAGE), call(OTHER))
class NameByAFunction(Base):
    """A function far away asks for the class."""

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        return y, _named(self)


class _Backwards(nn.Sequential):
    def __iter__(self):
        return reversed(list(self._modules.values()))


@kind(call(IMAGE), call(OTHER))
def sequential_with_its_own_order():
    return _Backwards(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))


class _Twice(nn.Sequential):
    def __iter__(self):
        for module in self._modules.values():
            yield module
            yield nn.Identity()


@kind(call(IMAGE), call(OTHER))
def sequential_with_more():
    return _Twice(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())


@kind(call(IMAGE), Call((IMAGE,), run=lambda m, x: copy.copy(m)(x)))
class ShallowCopied(Base):
    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())

    def forward(self, x):
        return self.relu(self.bn(self.conv(self.part(x))))


@kind(call(IMAGE), Call((IMAGE,), run=lambda m, x: copy.copy(m.part)(x)))
class PartShallowCopied(ShallowCopied):
    pass


@kind(call(IMAGE), Call((IMAGE,), run=lambda m, x: torch.jit.trace(m, x, check_trace=False)(x)))
class TracedByJit(_Parent):
    pass


@kind(call(IMAGE), Call((IMAGE,), run=lambda m, x: torch.fx.symbolic_trace(m)(x)))
class TracedByFx(_Parent):
    pass


@kind(
    call(IMAGE),
    Call((IMAGE,), run=lambda m, x: torch.func.vmap(m)(torch.stack([x, 2 * x]))),
    modes=(False,),
)
class MappedOver(_Parent):
    pass


def _directional(model, x):
    return torch.func.jvp(model, (x,), (torch.ones_like(x),))


@kind(call(IMAGE), Call((IMAGE,), run=_directional), modes=(False,))
class ForwardDerivative(_Parent):
    pass


class Shifted(nn.ReLU):
    """An activation's subclass does something else."""

    def forward(self, x):
        return super().forward(x) - 0.25


@kind(call(IMAGE), call(OTHER))
class SubclassOfAnActivation(Base):
    def __init__(self):
        super().__init__()
        self.act = Shifted()
        self.seq = nn.Sequential(nn.BatchNorm2d(3), Shifted())

    def forward(self, x):
        return self.seq(self.act(self.bn(self.conv(x))))


class Lazy(nn.Identity):
    """A subclass of what does nothing."""

    def forward(self, x):
        return x * 3


@kind(call(IMAGE), call(OTHER))
class SubclassOfIdentity(Base):
    def __init__(self):
        super().__init__()
        self.same = Lazy()

    def forward(self, x):
        return self.relu(self.same(self.bn(self.conv(x))))


class DropPath(nn.Module):
    """Has the name of what drops paths, and in training does something at rate 0 too."""

    def __init__(self):
        super().__init__()
        self.drop_prob = 0.0

    def forward(self, x):
        return x * 1.5 if self.training else x


@kind(call(IMAGE), call(OTHER))
class NamesakeOfDropPath(Base):
    def __init__(self):
        super().__init__()
        self.drop_path = DropPath()

    def forward(self, x):
        return self.relu(self.drop_path(self.bn(self.conv(x))) + x)


class BatchNormAct2d(nn.BatchNorm2d):
    """Has the name of timm's, and a setting that timm's does not have."""

    def __init__(self, channels, scale=1.0):
        super().__init__(channels)
        self.drop, self.act, self.scale = nn.Identity(), nn.ReLU(), scale

    def forward(self, x):
        return self.act(self.drop(super().forward(x))) * self.scale


@kind(call(IMAGE), call(OTHER))
class NamesakesWithSettings(nn.Module):
    """The first of a class does what its name says, the second does not."""

    def __init__(self):
        super().__init__()
        self.a, self.b = BatchNormAct2d(3), BatchNormAct2d(3, scale=2.0)

    def forward(self, x):
        return self.b(self.a(x))


@kind(call(IMAGE), Call((IMAGE,), before=lambda m: setattr(m.a, "scale", 5.0), fold=False))
class NamesakesSettingChanged(NamesakesWithSettings):
    pass


class FrozenBatchNorm2d(nn.Module):
    """Has the name of a frozen norm, and clamps what is large."""

    def __init__(self, channels):
        super().__init__()
        self.eps = 1e-5
        for name, fill in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), fill))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        y = (x - self.running_mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1)
        return (y + self.bias.view(1, -1, 1, 1)).clamp(-100, 100)


@kind(call(IMAGE), call(IMAGE * 1e4))
class NamesakeOfFrozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 1), FrozenBatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


class Scheduled(nn.BatchNorm2d):
    """Inherits ``forward``; its momentum is computed."""

    @property
    def momentum(self):
        return 0.5 / (1 + self.__dict__.get("turns", 0))

    @momentum.setter
    def momentum(self, value):
        self.__dict__["turns"] = self.__dict__.get("turns", -1) + 1


@kind(call(IMAGE), Call((OTHER,), before=lambda m: setattr(m.bn, "momentum", 0)), never=("recalibrate",))
class MomentumIsComputed(Base):
    def __init__(self):
        super().__init__()
        self.bn = Scheduled(3)

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


class Checked(nn.BatchNorm2d):
    """Inherits ``forward`` and takes other inputs."""

    def _check_input_dim(self, input):
        if input.dim() not in (2, 4):
            raise TypeError("rows or images")


@kind(call(IMAGE), call(IMAGE[:, :, 0, 0]), Call((IMAGE[:, :, 0],), fold=False))
class OtherCheckOfDimensions(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.relu = Checked(3), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(x))
