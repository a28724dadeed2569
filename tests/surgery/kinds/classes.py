"""What a module's class may be, and what it may have defined: a rewritten module has a subclass of it."""

import copy
import functools
import pickle
import threading

import torch
import torch.nn.functional as F
from torch import nn

from .base import IMAGE, OTHER, Base, Block
from .harness import Call, call, kind

MADE = []


class _Registered(Base):
    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        MADE.append(cls.__name__)


class _Leaf(_Registered):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


@kind(call(IMAGE), call(OTHER), outside=lambda: list(MADE))
def registers_its_subclasses():
    return _Leaf()


class _Final(Base):
    def __init_subclass__(cls, **kwargs):
        raise TypeError("this class is final")

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


@kind(call(IMAGE), call(OTHER))
def allows_no_subclass():
    return _Final()


class _NeedsAName(Base):
    def __init_subclass__(cls, *, kind, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.kind = kind


class _Named(_NeedsAName, kind="scaled"):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) * len(self.kind)


@kind(call(IMAGE), call(OTHER))
def subclasses_take_arguments():
    return _Named()


class _Meta(type):
    def __call__(cls, *args, **kwargs):
        made = super().__call__(*args, **kwargs)
        made.finished = True
        return made

    def __new__(mcs, name, bases, body):
        if "forward" in body and not body.get("__doc__"):
            raise TypeError("every network needs a docstring")
        return super().__new__(mcs, name, bases, body)


class _WithMeta(Base, metaclass=_Meta):
    """A class whose class has wishes."""

    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) if self.finished else x


@kind(call(IMAGE), call(OTHER))
def made_by_a_metaclass():
    return _WithMeta()


class _Locked(Base):
    """Holds what cannot be copied, and knows how to copy itself."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()
        self.copies = 0

    def __deepcopy__(self, memo):
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        state = {k: v for k, v in self.__dict__.items() if k != "lock"}
        twin.__dict__.update(copy.deepcopy(state, memo))
        twin.lock = threading.Lock()
        return twin

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "lock"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = threading.Lock()

    def forward(self, x):
        with self.lock:
            y = self.conv(x)
        return self.relu(self.bn(y))


@kind(
    call(IMAGE),
    Call((IMAGE,), run=lambda m, x: copy.deepcopy(m)(x)),
    Call((IMAGE,), run=lambda m, x: copy.deepcopy(copy.deepcopy(m))(x)),
    Call((IMAGE,), run=lambda m, x: pickle.loads(pickle.dumps(m))(x)),
)
class CopiesItself(_Locked):
    pass


@kind(
    call(IMAGE),
    Call((IMAGE,), run=lambda m, x: copy.deepcopy(m)(x)),
    Call((IMAGE,), run=lambda m, x: pickle.loads(pickle.dumps(m))(x)),
)
class PartCopiesItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = _Locked()

    def forward(self, x):
        return self.part(x) + 1


def _rebuilt(state):
    made = Reduced()
    made.load_state_dict(state)
    made.gain = 2.0
    return made.double()


@kind(
    call(IMAGE),
    Call((IMAGE,), run=lambda m, x: pickle.loads(pickle.dumps(m))(x), fold=False),
    modes=(False,),
)
class Reduced(Base):
    """A pickle of it is a recipe."""

    gain = 2.0

    def __reduce__(self):
        return _rebuilt, (self.state_dict(),)

    def __deepcopy__(self, memo):
        twin = Reduced.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) * self.gain


class _Delegates(nn.Module):
    """Finds in the network inside what it does not have itself."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inside"), name)

    def forward(self, x):
        return self.relu(self.bn2(F.relu(self.bn(self.conv(x)))))


@kind(call(IMAGE), call(OTHER), Call((IMAGE,), before=lambda m: setattr(m.inside, "relu", nn.Sigmoid())))
def delegates_attributes():
    return _Delegates(Base())


class _Counting(Base):
    def __init__(self):
        super().__init__()
        self.__dict__["reads"] = 0

    def __getattribute__(self, name):
        if name == "bn":
            d = super().__getattribute__("__dict__")
            if "reads" in d:
                d["reads"] += 1
        return super().__getattribute__(name)

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


@kind(call(IMAGE), call(OTHER), never=("fold", "recalibrate"))  # to look at the model is to change it
class CountsReads(_Counting):
    pass


@kind(call(IMAGE), call(OTHER), slow=True)
class EmptyInTests(Base):
    """A module that is false, and one that will not say."""

    class Falsy(Block):
        def __len__(self):
            return 0

    class Undecided(Block):
        def __bool__(self):
            raise RuntimeError("ambiguous")

    def __init__(self):
        super().__init__()
        self.one, self.two = self.Falsy(), self.Undecided()

    def forward(self, x):
        y = self.two(self.one(x))
        return y if self.one else self.relu(self.bn(y))


@kind(call(IMAGE), call(OTHER), slow=True)
class EqualModules(Base):
    """Modules that say they are equal."""

    class Alike(nn.BatchNorm2d):
        def __eq__(self, other):
            return isinstance(other, type(self))

        def __hash__(self):
            return id(self)

    def __init__(self):
        super().__init__()
        self.bn, self.bn2 = self.Alike(3), self.Alike(3)

    def forward(self, x):
        return F.relu(self.bn2(self.relu(self.bn(x)) + x))


@kind(call(IMAGE), call(OTHER))
class CachedProperty(Base):
    @functools.cached_property
    def act(self):
        return nn.Sigmoid()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


@kind(call(IMAGE), call(OTHER), slow=True)
class NewModuleAtEachRead(Base):
    def __init__(self):
        super().__init__()
        self.read = 0

    @property
    def act(self):
        self.read += 1
        return nn.Sigmoid() if self.read % 2 else nn.ReLU()

    def forward(self, x):
        return self.act(self.bn2(self.act(self.bn(self.conv(x)))))


class _ClassLevel(Base):
    act = nn.ReLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


def _no_act():
    _ClassLevel.act = nn.ReLU()


@kind(
    call(IMAGE),
    Call((IMAGE,), before=lambda m: setattr(_ClassLevel, "act", nn.Tanh())),
    reset=_no_act,
)
class ModuleOfTheClass(_ClassLevel):
    pass


@kind(call(IMAGE), call(OTHER))
class PartialMethod(Base):
    def _run(self, x, gain):
        return self.relu(self.bn(self.conv(x))) * gain

    forward = functools.partialmethod(_run, gain=2.0)


@kind(call(IMAGE), call(OTHER), slow=True)
class PartialOnTheInstance(Base):
    def __init__(self):
        super().__init__()
        self.scale = functools.partial(torch.mul, other=0.5)

    def forward(self, x):
        return self.scale(self.relu(self.bn(self.scale(self.conv(x)))))


class _Kw(Base):
    def forward(self, x, *, gain=1.0):
        return self.relu(self.bn(self.conv(x))) * gain


def _kw(value):
    _Kw.forward.__kwdefaults__ = {"gain": value}


@kind(call(IMAGE), Call((IMAGE,), before=lambda m: _kw(5.0)), reset=lambda: _kw(1.0))
class KeywordDefaultsChanged(_Kw):
    pass


@kind(call(IMAGE), call(IMAGE, 2.0), call(OTHER))
class PositionalOnly(Base):
    def forward(self, x, gain=1.5, /, *more, offset=(0.5,), **named):
        return self.relu(self.bn(self.conv(x))) * gain + offset[0] + len(more) + len(named)


@kind(call(IMAGE), call(OTHER))
class ArgumentsOfTheNormByKeyword(Base):
    def forward(self, x):
        y = self.bn(input=self.conv(x))
        y = F.relu(input=y)
        return F.relu(self.bn2(*[y]), inplace=True)


def _is_block(module):
    return type(module) is Block


@kind(call(IMAGE), call(OTHER))
class ExactTypeByAFunction(nn.Module):
    """The question stands in another function."""

    def __init__(self):
        super().__init__()
        self.part = Block()

    def forward(self, x):
        return self.part(x) if _is_block(self.part) else x


def _logged(forward):
    @functools.wraps(forward)
    def run(self, *args):
        return forward(self, *args) if type(self) is OwnTypeInADecorator else args[0]

    return run


@kind(call(IMAGE), call(OTHER))
class OwnTypeInADecorator(Base):
    @_logged
    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


@kind(call(IMAGE), call(OTHER))
class NameOfItsOwnClass(Base):
    """A name is that of the class; code that asks for it may be rewritten."""

    gain = 2.0

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x.type(torch.float64))))
        return y * len(type(self).__name__) * self.__class__.gain + isinstance(y, type(x))
