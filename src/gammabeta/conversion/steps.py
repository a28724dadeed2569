"""What a callee does: a step that may join a batch norm, or something that may run while one waits."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import Module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ..epilogue import ACTIVATION_MODULES, MaxPool, activation_of_call, activation_of_module
from ..graph.layers import ON_ALL_MODULES
from ..kernels.backend import LARGEST_WINDOW
from ..nn.frozen import Frozen
from ..nn.layer import Fused

# What joins a batch norm: ("activation", its name), ("prelu", its slope), ("pool", its windows), or NOTHING,
# which changes nothing.
# What joins a convolution: ("norm", the frozen batch norm).
Step = tuple[str, Any]
NOTHING: Step = ("nothing", None)
_PRELUS = (F.prelu, torch.prelu, "prelu")
_DROPOUTS = (F.dropout, torch.dropout)  # as they are now: another function in their place does who knows what
_MODULE_CALL = Module.__call__
_count_modes = torch._C._len_torch_function_stack


def quiet(module: Module) -> bool:
    """Whether a call of the module is one of its class's ``forward``, with nothing before or after."""
    state = module.__dict__
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or state.get("_compiled_call_impl") is not None
        or type(module).__call__ is not _MODULE_CALL
        or any(ON_ALL_MODULES)
    )


def modes_see_calls() -> bool:
    """Whether a mode, other than that of a default device, may change what torch's functions do."""
    return _count_modes() > 0 and any(
        not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack()
    )


def does_nothing_more(layer: Fused) -> bool:
    """Whether the layer itself is a batch norm and nothing else."""
    return layer.activation is None and layer.pool is None


# --- what may run while a call waits ----------------------------------------------------------------------

_FUNCTIONS = ("torch.nn.functional", "torch._C._nn")
_HAVE_STATE = ("batch_norm", "instance_norm", "embedding_bag")


def plain(module: Module, layer: Module | None = None) -> bool:
    """Whether a module, and all in it, does what its class says and nothing else; and is not ``layer``."""
    for one in module.modules():
        known = _is_plain_class(type(one)) or "_plain_code" in one.__dict__
        if one is layer or not known or not quiet(one):
            return False
    return True


_PLAIN_CLASSES: dict[type[Module], bool] = {}


def _is_plain_class(kind: type[Module]) -> bool:
    if kind not in _PLAIN_CLASSES:
        _PLAIN_CLASSES[kind] = _is_known(kind)
    return _PLAIN_CLASSES[kind]


def _is_known(kind: type[Module]) -> bool:
    place = kind.__module__
    ours = place.startswith("gammabeta.nn") and issubclass(kind, Fused)
    return bool(
        ours
        or (place.startswith("torch.nn.modules.") and not issubclass(kind, nn.modules.lazy.LazyModuleMixin))
    )


def is_plain_function(function: Any) -> bool:
    """Whether a function of PyTorch's only computes from its arguments."""
    name = getattr(function, "__name__", "_")
    return (
        getattr(function, "__module__", "") in _FUNCTIONS
        and not name.endswith("_")
        and name not in _HAVE_STATE
    )


# --- steps ------------------------------------------------------------------------------------------------


def step_of(callee: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step | None:
    """What a call with a batch norm's output as its first argument does that could join it."""
    if isinstance(callee, Module):
        if args or kwargs or not quiet(callee):
            return None
        return step_of_module(callee)
    try:
        name = activation_of_call(callee, args, kwargs)
        pooling = _POOL_FUNCTIONS.get(callee)
    except TypeError:  # an object that can be called and not be hashed
        return None
    if name is not None:
        return "activation", name
    if pooling is not None:
        return _pool_step(pooling, {**dict(zip(pooling, args, strict=False)), **kwargs})
    if callee in _PRELUS and len(args) == 1 and not kwargs:
        return "prelu", args[0]
    if callee in _DROPOUTS:
        given = {**dict(zip(("p", "training"), args, strict=False)), **kwargs}
        idle = given.get("training", True) is False or given.get("p", 0.5) == 0
        return NOTHING if idle else None
    return None


def step_of_module(module: Module) -> Step | None:
    """The same for a module that is called with nothing else."""
    kind = type(module)
    runs = _RUNS.get(kind)
    if runs is None:
        return ("norm", module) if isinstance(module, Frozen) and _is_frozen_alone(module) else None
    if kind.forward is not runs[0] or getattr(runs[1], runs[2]) is not runs[3]:
        return None
    name = activation_of_module(module)
    if name is not None:
        return "activation", name
    if kind in IDLE:
        return NOTHING if IDLE[kind](module) else None
    pooling = _POOL_MODULES.get(kind)
    if pooling is not None:
        return _pool_step(pooling, {name: getattr(module, name) for name in pooling})
    if kind is nn.PReLU:
        return "prelu", module.weight
    name = LEARNED.get(kind)
    return ("activation", name) if name is not None else None


def _is_frozen_alone(module: Frozen) -> bool:
    own = getattr(type(module), "_normalising", type(module)).forward  # a class may be another library's, too
    return own is Fused.forward and does_nothing_more(module)


def _drops_nothing(module: Any) -> bool:
    return not module.training or module.p == 0


#: Modules that return what they are given, when the function says so of one.
IDLE: dict[type[Module], Callable[[Any], bool]] = {nn.Identity: lambda module: True} | dict.fromkeys(
    (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    _drops_nothing,
)

#: Classes of other libraries whose modules compute one of our activations, by its name.
LEARNED: dict[type[Module], str] = {}

_MEAN = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_MAX = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_POOL_MODULES = {nn.AvgPool2d: _MEAN, nn.MaxPool2d: _MAX}
_POOL_FUNCTIONS: dict[Any, tuple[str, ...]] = {
    F.avg_pool2d: _MEAN,
    torch._C._nn.avg_pool2d: _MEAN,
    F.max_pool2d: _MAX,
    torch.max_pool2d: _MAX[:5],
}


# Of each class, when it was first met: its forward, and the function of torch's that this calls, with its
# place. A class of which one of the two was replaced since does something that is not known.
_Runs = tuple[Any, Any, str, Any]
_RUNS: dict[type[Module], _Runs] = {}


def note_what_runs(kind: type[Module]) -> None:
    """Note what the modules of a class run, before anybody replaces it; without that none of them joins."""
    code = getattr(kind.forward, "__code__", None)
    names = code.co_names if code else ()
    owner = F if "F" in names else torch
    name = next((name for name in names if callable(getattr(owner, name, None))), "relu")
    _RUNS[kind] = kind.forward, owner, name, getattr(owner, name)


for _kind in (*ACTIVATION_MODULES, nn.PReLU, *IDLE, *_POOL_MODULES):
    note_what_runs(_kind)


def _pool_step(names: tuple[str, ...], given: dict[str, Any]) -> Step | None:
    kernel = _side(given.get("kernel_size"))
    stride, padding = _side(given.get("stride") or kernel), _side(given.get("padding", 0))
    if kernel is None or stride is None or padding is None or given.get("ceil_mode", False):
        return None
    if names is _MEAN:
        halves = (kernel, stride, padding) == (2, 2, 0) and given.get("divisor_override") is None
        return ("pool", 2) if halves else None
    dense = _side(given.get("dilation", 1)) == 1 and not given.get("return_indices", False)
    fits = dense and kernel**2 <= LARGEST_WINDOW and 0 <= padding <= kernel // 2
    return ("pool", MaxPool(kernel, stride, padding)) if fits else None


def _side(size: Any) -> int | None:
    """The one number of a size that is the same in height and width."""
    sides = set(size) if isinstance(size, tuple | list) else {size}
    (side,) = sides if len(sides) == 1 else (None,)
    return side if type(side) is int else None
