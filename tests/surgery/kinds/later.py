"""What a user does to a model after surgery: hooks, other modules, other settings, copies, new weights."""

import copy
import io
import pickle

import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn

from .base import IMAGE, OTHER, Base, Block
from .harness import Call, call, kind


class Two(nn.Module):
    """Two blocks in a row and a residual around a third."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        self.block = Block()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        x = self.block(self.stem(x))
        return self.relu(self.bn(self.conv(x)) + x)


def _later(change, fold=False):
    return kind(call(IMAGE), Call((IMAGE,), before=change, fold=fold), Call((OTHER,), fold=fold))


def _doubled(_module, _given, out):
    return out * 2


@_later(lambda m: m.bn.register_forward_hook(_doubled))
class HookOnTheNorm(Two):
    pass


@_later(lambda m: m.stem[2].register_forward_hook(_doubled))
class HookOnTheActivation(Two):
    pass


@_later(lambda m: m.stem[1].register_forward_pre_hook(lambda m, i: (i[0] + 1,)))
class PreHookOnTheNorm(Two):
    pass


@_later(lambda m: m.relu.register_full_backward_hook(lambda m, i, o: (i[0] * 2,)))
class BackwardHookLater(Two):
    pass


@_later(lambda m: m.stem.register_forward_hook(_doubled))
class HookOnTheContainer(Two):
    pass


@_later(lambda m: setattr(m, "relu", nn.Tanh()))
class ActivationReplaced(Two):
    pass


@_later(lambda m: m.stem.__setitem__(2, nn.LeakyReLU(0.3)))
class ActivationOfSequentialReplaced(Two):
    pass


@_later(lambda m: setattr(m.block, "bn", nn.Identity()))
class NormReplaced(Two):
    pass


@_later(lambda m: setattr(m.block, "bn", nn.InstanceNorm2d(3)))
class NormReplacedByAnother(Two):
    pass


@_later(lambda m: setattr(m, "block", nn.Sequential(nn.Tanh())))
class BlockReplaced(Two):
    pass


@_later(lambda m: m.stem.append(nn.Sigmoid()))
class SequentialAppended(Two):
    pass


@_later(lambda m: m.stem.__delitem__(2))
class SequentialShortened(Two):
    pass


@_later(lambda m: m.stem._modules.__setitem__("2", nn.Sigmoid()))
class ModulesDictionaryWritten(Two):
    pass


class Leaky(Base):
    def __init__(self):
        super().__init__()
        self.act = nn.LeakyReLU(0.1)

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


@_later(lambda m: setattr(m.act, "negative_slope", 0.6))
class SlopeChanged(Leaky):
    pass


@_later(lambda m: setattr(m.act, "inplace", True))
class InPlaceSwitchedOn(Leaky):
    pass


class Learned(Base):
    def __init__(self):
        super().__init__()
        self.act = nn.PReLU(3)

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


def _no_slope(model):
    with torch.no_grad():
        model.act.weight.fill_(0.7)


@_later(_no_slope)
class LearnedSlopeChanged(Learned):
    pass


@_later(lambda m: m.bn.eval())
class NormSetToEvaluation(Two):
    pass


@_later(lambda m: (m.block.eval(), m.block.requires_grad_(False)))
class BlockFrozen(Two):
    pass


@_later(lambda m: (setattr(m.bn, "momentum", 0.5), setattr(m.bn, "eps", 0.1)))
class NormsSettingsChanged(Two):
    pass


@_later(lambda m: setattr(m.bn, "momentum", None))
class MomentumNone(Two):
    pass


@_later(lambda m: setattr(m.bn, "track_running_stats", False))
class TrackingSwitchedOff(Two):
    pass


def _without_statistics(model):
    model.bn.running_mean = model.bn.running_var = None


@_later(_without_statistics)
class StatisticsRemoved(Two):
    pass


@_later(lambda m: m.bn.reset_running_stats())
class StatisticsReset(Two):
    pass


@_later(lambda m: setattr(m.bn, "weight", nn.Parameter(torch.full((3,), 2.0).double())))
class WeightReplaced(Two):
    pass


def _new_weights(model):
    state = {k: v * 0.5 + 0.1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)


@_later(_new_weights)
class StateDictLoaded(Two):
    pass


def _assigned(model):
    state = {k: v * 0.5 + 0.1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


@_later(_assigned)
class StateDictAssigned(Two):
    pass


@kind(call(IMAGE), Call((IMAGE.float(),), before=lambda m: m.float()))
class ToFloat32(Two):
    pass


@kind(call(IMAGE), Call((IMAGE.bfloat16(),), before=lambda m: m.bfloat16()), modes=(False,))
class ToBfloat16(Two):
    pass


@kind(call(IMAGE), Call((IMAGE,), before=lambda m: m.to(memory_format=torch.channels_last)))
class ToChannelsLast(Two):
    pass


@kind(call(IMAGE), Call((IMAGE,), run=lambda m, x: copy.deepcopy(m)(x)))
class DeepCopied(Two):
    pass


@kind(call(IMAGE), Call((IMAGE,), run=lambda m, x: pickle.loads(pickle.dumps(m))(x)))
class Pickled(Two):
    pass


def _saved(model, x):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)(x)


@kind(call(IMAGE), Call((IMAGE,), run=_saved))
class Saved(Two):
    pass


def _hooked_copy(model, x):
    twin = copy.deepcopy(model)
    twin.block.bn.register_forward_hook(_doubled)
    return twin(x)


@kind(call(IMAGE), Call((IMAGE,), run=_hooked_copy, fold=False))
class HookOnACopy(Two):
    pass


@kind(
    call(IMAGE),
    Call((IMAGE,), run=lambda m, x: m.stem[:2](x), fold=False),
    Call((IMAGE,), run=lambda m, x: m.stem[1:](x), fold=False),
)
class PartOfASequential(Two):
    pass


@kind(call(IMAGE), Call((IMAGE,), run=lambda m, x: nn.Sequential(*m.stem.children(), m.block)(x), fold=False))
class LayersInANewSequential(Two):
    """A new model is built from the layers of the old one."""


@kind(
    call(IMAGE),
    Call((IMAGE,), run=lambda m, x: m.bn(x), fold=False),
    Call((IMAGE,), run=lambda m, x: m.relu(m.bn(x)), fold=False),
)
class NormCalledAlone(Two):
    pass


@kind(call(IMAGE), Call((IMAGE,), run=lambda m, x: [c(x) for c in m.children()], fold=False))
class ChildrenCalledAlone(Two):
    pass


@_later(lambda m: setattr(m, "forward", lambda x: F.relu(m.bn(x))))
class ForwardReplacedOnTheInstance(Two):
    pass


@_later(lambda m: setattr(m.block, "forward", lambda x: m.block.bn(x) * 2))
class BlocksForwardReplaced(Two):
    pass


class _Patched(Base):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


_FORWARD = _Patched.forward


def _patch(_model):
    _Patched.forward = lambda self, x: self.bn(x) - 1


@kind(
    call(IMAGE),
    Call((IMAGE,), before=_patch, fold=False),
    reset=lambda: setattr(_Patched, "forward", _FORWARD),
)
class ForwardReplacedOnTheClass(_Patched):
    pass


@_later(lambda m: m.apply(lambda c: setattr(c, "inplace", True) if hasattr(c, "inplace") else None))
class AppliedToAll(Two):
    pass


@_later(lambda m: nn.utils.parametrizations.weight_norm(m.conv))
class ParametrizedLater(Two):
    pass


@_later(lambda m: torch.nn.utils.prune.l1_unstructured(m.bn, "weight", 1))
class PrunedLater(Two):
    pass


@_later(lambda m: m.block.add_module("act", nn.Sequential(nn.ReLU(), nn.Sigmoid())))
class ModuleAddedOver(Two):
    pass


@_later(lambda m: setattr(m.block, "act", torch.sigmoid), fold=False)
class ActivationBecomesAFunction(Base):
    """A module's place is taken by a plain attribute."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.act = nn.BatchNorm2d(3), None
            self.act = torch.relu

        def forward(self, x):
            return self.act(self.bn(x))

    def __init__(self):
        super().__init__()
        self.block = self.Inner()

    def forward(self, x):
        return self.block(self.conv(x))
