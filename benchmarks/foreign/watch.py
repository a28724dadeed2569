"""What a model does with its batch norms, watched at torch's operators, whoever calls them.

Nothing of the package takes part, so that it can be the judge of it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
ACTIVATIONS = {
    _aten.relu,
    _aten.relu_,
    _aten.hardtanh,
    _aten.hardtanh_,
    _aten.silu,
    _aten.silu_,
    _aten.hardswish,
    _aten.hardswish_,
    _aten.hardsigmoid,
    _aten.hardsigmoid_,
    _aten.sigmoid,
    _aten.sigmoid_,
    _aten.tanh,
    _aten.tanh_,
    _aten.leaky_relu,
    _aten.leaky_relu_,
    _aten.elu,
    _aten.elu_,
    _aten.gelu,
    _aten.mish,
    _aten.mish_,
    _aten._prelu_kernel,
}
_ADDS = {_aten.add, _aten.add_}


def norms(model: nn.Module) -> dict[int, str]:
    """The name of each module with running statistics, by where these lie in memory."""
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        mean = getattr(module, "running_mean", None)
        if isinstance(mean, Tensor) and (isinstance(module, _BatchNorm) or not list(module.children())):
            found.setdefault(mean.data_ptr(), name)
    return found


@dataclass
class _Value:
    """A batch norm's output, or a sum with one in it."""

    tensor: Tensor  # kept, so that its id stays its own
    norms: frozenset[str]
    parents: tuple["_Value", ...] = ()
    uses: int = 0
    activation: str = ""

    @property
    def alone(self) -> bool:
        """Whether nothing but what followed has taken it."""
        return self.uses == 1


class _Flow(TorchDispatchMode):
    """Which activation follows which batch norm, at once or after an addition."""

    def __init__(self, layers: dict[int, str]) -> None:
        super().__init__()
        self.layers = layers
        self.ran: list[str] = []
        self.values: list[_Value] = []
        self.now: dict[int, _Value] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        op = func.overloadpacket
        if op in (_aten.detach, _aten.alias):
            return out
        known = [v for arg in tree_leaves(args) if isinstance(arg, Tensor) and (v := self.now.get(id(arg)))]
        for value in known:
            value.uses += 1
            if op in ACTIVATIONS:
                value.activation = func.__name__.split(".")[0].strip("_")
        if func._schema.is_mutable and isinstance(out, Tensor):
            self.now.pop(id(out), None)
        if op in _ADDS and known and not any(value.parents for value in known):
            self._keep(_Value(out, frozenset().union(*(v.norms for v in known)), tuple(known)))
        if op in (_aten.native_batch_norm, _aten.cudnn_batch_norm) and args[3] is not None:
            layer = self.layers.get(args[3].data_ptr())
            if layer is not None:
                self.ran.append(layer)
                self._keep(_Value(out[0], frozenset({layer})))
        return out

    def _keep(self, value: _Value) -> None:
        self.values.append(value)
        self.now[id(value.tensor)] = value


class Behind(NamedTuple):
    """An activation, and the batch norms whose output, or whose sum, is all that it takes."""

    activation: str
    norms: frozenset[str]


def followers(model: nn.Module, run: Callable[[nn.Module], object]) -> tuple[list[str], list[Behind]]:
    """The batch norms that a run reaches, and the activations that could be computed with them.

    Left out is what follows a norm that is called more than once, and a value that is used elsewhere too.
    """
    with torch.no_grad(), _Flow(norms(model)) as flow:
        run(model)
    found = []
    for value in flow.values:
        givers = [v for v in value.parents or (value,) if v.alone]
        able = frozenset(n for v in givers for n in v.norms if flow.ran.count(n) == 1)
        if value.activation and value.alone and able:
            found.append(Behind(value.activation, able))
    return list(dict.fromkeys(flow.ran)), found


class _Moments(TorchDispatchMode):
    """Normalise by the batch whatever has a layer's running statistics, and keep what it was given."""

    def __init__(self, layers: dict[int, str]) -> None:
        super().__init__()
        self.layers = layers
        self.seen: dict[str, list[Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten.native_batch_norm.default:
            values, weight, bias, mean, _var, *_, eps = args
            name = None if mean is None else self.layers.get(mean.data_ptr())
            if name is not None:
                self.seen.setdefault(name, []).append(values.transpose(0, 1).flatten(1))
                return func(values, weight, bias, None, None, True, 0.0, eps)
        return func(*args, **(kwargs or {}))


def statistics(model: nn.Module, run: Callable[[nn.Module], object]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and unbiased variance of the input of each batch norm that a run reaches, on a copy.

    All but batch norm is in evaluation, and every batch norm normalises by the batch.
    """
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module.training = False
    layers = {
        m.running_mean.data_ptr(): name
        for name, m in twin.named_modules()
        if isinstance(m, _BatchNorm) and m.running_mean is not None
    }
    with torch.no_grad(), _Moments(layers) as moments:
        run(twin)
    pooled = {name: torch.cat(parts, 1) for name, parts in moments.seen.items()}
    return {name: (p.mean(1), p.var(1)) for name, p in pooled.items()}
