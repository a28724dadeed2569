"""Who calls whom, and how: ``.forward()``, functions on a child's tensors, subclasses, wrappers."""

import copy
import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from .base import IMAGE, OTHER, ROWS, Base, Block
from .harness import Call, call, kind, x


@kind(call(IMAGE), call(OTHER))
class ForwardCalledDirectly(Base):
    def forward(self, x):
        return self.relu.forward(self.bn.forward(self.conv.forward(x)))


@kind(call(IMAGE), call(OTHER))
class BlocksForwardCalledDirectly(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x):
        return self.blocks.forward(self.block.forward(x))


@kind(call(IMAGE), call(OTHER))
class UnboundForward(Base):
    def forward(self, x):
        return nn.ReLU.forward(self.relu, nn.BatchNorm2d.forward(self.bn, self.conv(x)))


@kind(call(IMAGE), call(OTHER))
class FunctionOnAChildsBuffers(Base):
    def forward(self, x):
        bn = self.bn
        y = F.batch_norm(
            self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training, 0.1, bn.eps
        )
        return self.relu(y)


@kind(call(IMAGE), call(OTHER))
class FunctionAndModule(Base):
    """A norm called once as a module, once through its tensors."""

    def forward(self, x):
        bn = self.bn
        y = self.relu(bn(self.conv(x)))
        return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)


@kind(call(IMAGE), call(OTHER))
class TorchsFunction(Base):
    def forward(self, x):
        b = self.bn
        y = torch.batch_norm(
            x, b.weight, b.bias, b.running_mean, b.running_var, b.training, 0.1, b.eps, False
        )
        return self.relu(y)


class OwnNorm(nn.BatchNorm2d):
    """Norm and activation in one, as timm's ``BatchNormAct2d`` is written."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        training = self.training or not self.track_running_stats
        y = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training, 0.1, self.eps
        )
        return self.act(self.drop(y))


@kind(call(IMAGE), call(OTHER))
class NormWithActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), OwnNorm(4)

    def forward(self, x):
        return self.bn(self.conv(x))


class Reversed(nn.BatchNorm2d):
    """Looks like the class above and does something else."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return super().forward(self.act(x))


@kind(call(IMAGE), call(OTHER))
class ActivationBeforeTheNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), Reversed(4)

    def forward(self, x):
        return self.bn(self.conv(x))


class Clamped(nn.BatchNorm2d):
    """Only large values show that it is no plain batch norm."""

    def forward(self, x):
        return super().forward(x).clamp(max=6.0)


@kind(call(IMAGE), call(x(4, 3, 6, 6, at=5) * 50), call(OTHER * 1e3))
class SubclassThatClamps(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3), Clamped(4), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


class Conditional(nn.BatchNorm2d):
    """Takes a second argument."""

    def forward(self, x, gain=None):
        y = super().forward(x)
        return y if gain is None else y * gain.view(-1, 1, 1, 1)


@kind(call(IMAGE), call(IMAGE, torch.tensor([1.0, 2.0, 0.5, 3.0]).double()))
class ConditionalNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3), Conditional(4), nn.ReLU()

    def forward(self, x, gain=None):
        return self.relu(self.bn(self.conv(x), gain))


@kind(call(ROWS), call(x(6, 5, at=1)), call(x(7, 5)))
class NormOfRowsAsImages(nn.Module):
    """A BatchNorm2d over rows that are given two more dimensions."""

    def __init__(self):
        super().__init__()
        self.fc, self.bn = nn.Linear(5, 4), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.bn(self.fc(x)[:, :, None, None]).flatten(1))


class Parent(Base):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


@kind(call(IMAGE), call(IMAGE, OTHER))
class CallsSuper(Parent):
    def forward(self, x, skip=None):
        y = super().forward(x)
        return y if skip is None else self.bn2(y) + skip


class Mixin:
    def forward(self, x):
        return super().forward(x + 1) * 2


@kind(call(IMAGE), call(OTHER))
class MultipleInheritance(Mixin, Parent):
    pass


@kind(call(IMAGE), call(IMAGE, OTHER))
class SequentialWithItsOwnForward(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())

    def forward(self, x, skip=None):
        y = self[1](self[0](x))
        return y if skip is None else self[2](y + skip)


@kind(call(IMAGE), call(OTHER))
class SequentialBackwards(nn.Sequential):
    def __init__(self):
        super().__init__(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))

    def forward(self, x):
        for layer in reversed(self):
            x = layer(x)
        return x


@kind(call(IMAGE), call(OTHER))
def nested_with_hooks():
    inner = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    model = nn.Sequential(nn.Conv2d(3, 3, 1), inner, nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    inner.seen = []
    inner.register_forward_pre_hook(lambda m, i: m.seen.append(float(i[0].detach().sum())))
    model[2][1].register_forward_hook(lambda m, i, o: o * 2)
    return model


@kind(call(IMAGE), call(OTHER))
def hook_changes_the_norms_output():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    model[1].register_forward_hook(lambda m, i, o: o + 1)
    model[0].register_forward_pre_hook(lambda m, i: (i[0] * 2,))
    return model


@kind(call(IMAGE), call(OTHER))
def hook_in_the_backward_pass():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    model[1].register_full_backward_hook(lambda m, i, o: (i[0] * 3,))
    return model


@kind(call(IMAGE), call(OTHER))
class CallOverridden(Parent):
    def __call__(self, x):
        return super().__call__(x) + 1


class Doubled(nn.BatchNorm2d):
    def __call__(self, x):
        return super().__call__(x) * 2


@kind(call(IMAGE), call(OTHER))
class NormsCallOverridden(Parent):
    def __init__(self):
        super().__init__()
        self.bn = Doubled(3)


@kind(call(IMAGE), Call((IMAGE,), run="encode"), Call((OTHER,), run="decode"))
class EncodeAndDecode(Base):
    def encode(self, x):
        return self.relu(self.bn(self.conv(x)))

    def decode(self, z):
        return self.bn2(self.conv2(z))

    def forward(self, x):
        return self.decode(self.encode(x))


@kind(Call((IMAGE,), run="features"), call(OTHER), Call((IMAGE,), run="head"), never=("fold",))
class OtherMethodFirst(Base):
    def features(self, x):
        return self.bn(self.conv(x))

    def head(self, x):
        return self.bn2(self.conv2(x)).sigmoid()

    def forward(self, x):
        return self.head(self.relu(self.features(x)))


@kind(
    call(IMAGE),
    Call((IMAGE,), run=lambda m, x: m.bn(m.conv2(x)), fold=False),
    Call((IMAGE,), run=lambda m, x: m.conv(x), fold=False),
)
class PartsCalledFromOutside(Base):
    """What stands in a model can be called by its user."""

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


@kind(call(IMAGE), call(OTHER))
class PartialOfTheNorm(Base):
    def forward(self, x):
        run = functools.partial(self.bn)
        return self.relu(functools.reduce(lambda y, f: f(y), [self.conv, run], x))


@kind(call(IMAGE), call(OTHER))
class LayersInAList(Base):
    """Kept in a plain list too, which nothing else knows of."""

    def __init__(self):
        super().__init__()
        self.steps = [self.conv, self.bn, F.relu]

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


@kind(call(IMAGE), call(OTHER))
class ParentSeen(nn.Module):
    """A child holds its parent and calls the parent's layers."""

    class Child(nn.Module):
        def __init__(self, parent):
            super().__init__()
            self.parent = [parent]

        def forward(self, x):
            return F.relu(self.parent[0].bn(x))

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.child = self.Child(self)

    def forward(self, x):
        return self.child(x) + self.bn(x + 1)


@kind(call(IMAGE), call(OTHER), twice=True)
class Checkpointed(Base):
    def block(self, x):
        return self.relu(self.bn(self.conv(x)))

    def forward(self, x):
        return self.bn2(checkpoint(self.block, x, use_reentrant=False))


@kind(call(IMAGE), call(OTHER), twice=True)
class CheckpointedSequential(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block(), Block())

    def forward(self, x):
        return checkpoint_sequential(self.blocks, 2, x, use_reentrant=False)


@kind(call(IMAGE), call(OTHER), twice=True)
class CheckpointedInTraining(Base):
    def forward(self, x):
        y = self.conv(x)
        if self.training:
            return self.relu(checkpoint(self.bn, y, use_reentrant=False))
        return self.relu(self.bn(y))


@kind(call(IMAGE), call(OTHER))
class PartWithoutGradient(Base):
    def forward(self, x):
        with torch.no_grad():
            y = self.relu(self.bn(self.conv(x)))
        return self.relu(self.bn2(self.conv2(y)))


@kind(call(IMAGE), call(OTHER))
class NormWithoutGradient(Base):
    def forward(self, x):
        y = self.conv(x)
        with torch.no_grad():
            y = self.bn(y)
        return self.relu(y) + self.bn2(x)


@kind(call(IMAGE), call(OTHER))
class DecoratedNoGrad(Base):
    @torch.no_grad()
    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


@kind(call(IMAGE), call(OTHER))
class GradientAllowedInside(Base):
    @torch.enable_grad()
    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


@kind(call(IMAGE), Call((OTHER,), around=lambda: torch.autocast("cpu", torch.bfloat16)))
class AutocastOff(Base):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.relu(self.bn(self.conv(x)))


@kind(call(IMAGE), call(OTHER))
class AutocastAround(Base):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = self.conv(x)
        return self.relu(self.bn(y))


class WithScript(Base):
    def __init__(self):
        super().__init__()
        self.part = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))

    def forward(self, x):
        return self.part(self.relu(self.bn(self.conv(x))))


@kind(call(IMAGE), call(OTHER))
def script_inside():
    return WithScript()


@kind(call(IMAGE), call(OTHER))
class ScriptedActivation(Base):
    def __init__(self):
        super().__init__()
        self.act = torch.jit.script(nn.ReLU())

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


@kind(call(IMAGE), call(OTHER), must=())
def script_whole():
    return torch.jit.script(Parent())


@kind(call(IMAGE), call(OTHER))
class CompiledPart(Base):
    def __init__(self):
        super().__init__()
        self.part = torch.compile(Block(), backend="eager")

    def forward(self, x):
        return self.part(self.relu(self.bn(self.conv(x))))


@kind(call(IMAGE), call(OTHER))
def data_parallel():
    return nn.DataParallel(Parent())


@kind(call(IMAGE), call(OTHER))
def averaged():
    return AveragedModel(Parent())


class Wrapper(nn.Module):
    """Hands on everything, as peft's and accelerate's wrappers do."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


@kind(call(IMAGE), call(x=OTHER), must=("convert", "fold"))
def wrapped():
    return Wrapper(Parent())


@kind(call(IMAGE), call(OTHER))
class FunctionalCall(Base):
    """Another set of weights through ``torch.func.functional_call`` (meta-learning)."""

    def __init__(self):
        super().__init__()
        self.inner = Block()

    def forward(self, x):
        weights = {name: p * 0.5 for name, p in self.inner.named_parameters()}
        fast = torch.func.functional_call(self.inner, weights, (x,))
        return fast + self.inner(x)


@kind(call(IMAGE), call(OTHER))
class CopyInForward(Base):
    """A copy of a part is made and run: its statistics are its own."""

    def __init__(self):
        super().__init__()
        self.inner = Block()

    def forward(self, x):
        return copy.deepcopy(self.inner)(x) + self.inner(x)


@kind(call(IMAGE), call(OTHER))
class CallsEveryChild(Base):
    def forward(self, x):
        for _, child in self.named_children():
            x = child(x)
        return x


@kind(call(IMAGE), call(OTHER))
class CallsByType(Base):
    """Exact types are looked for."""

    def forward(self, x):
        for child in self.children():
            if isinstance(child, nn.BatchNorm2d):
                x = F.relu(child(x))
            elif isinstance(child, nn.Conv2d):
                x = child(x)
        return x


@kind(call(IMAGE), call(OTHER), must=(), never=("recalibrate",))
class InstanceForward(nn.Module):
    """``forward`` is a function set on the instance, and holds this instance: copies call its layers."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.forward = lambda x: F.relu(self.bn(x))


@kind(call(IMAGE), call(OTHER))
class InstanceMethod(Base):
    """``forward`` is another method of the same object."""

    def __init__(self):
        super().__init__()
        self.forward = self.run

    def run(self, x):
        return self.relu(self.bn(self.conv(x)))


@kind(call(IMAGE), call(OTHER))
class HalfCalledDirectly(Base):
    """Hooks see one of the two norms."""

    def forward(self, x):
        y = self.relu(self.bn.forward(self.conv(x)))
        return self.relu(self.bn2(self.conv2(y)))


@kind(call(IMAGE), call(OTHER))
class HalfThroughAFunction(Base):
    def forward(self, x):
        b = self.bn2
        y = self.relu(self.bn(self.conv(x)))
        return F.batch_norm(
            y, b.running_mean, b.running_var, b.weight, b.bias, b.training, b.momentum, b.eps
        ).relu()


@kind(call(IMAGE), call(OTHER))
def lone_norm():
    return nn.BatchNorm2d(3)


@kind(call(IMAGE), call(OTHER))
def no_running_statistics():
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU())


@kind(call(IMAGE), call(OTHER))
def no_affine():
    return nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False), nn.ReLU(), nn.BatchNorm2d(3, momentum=None)
    )


@kind(call(IMAGE), call(OTHER))
class NeverCalled(Base):
    """A norm that no call reaches."""

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


@kind(call(IMAGE), Call((IMAGE,), before=lambda m: setattr(m, "aux", True)))
class AuxiliaryHead(Base):
    """A second head runs only when it is switched on."""

    aux = False

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        return (y, self.bn2(self.conv2(y))) if self.aux else y
