"""A batch norm that was called and has not run yet, because what follows may join its pass.

A rewritten forward is the model's own code, with a few of its calls made through ``call``, ``add`` and their
like. These return a ``Pending`` where they would return the output of a batch norm. Whatever reads it next
either joins it (an addition, an activation, a pooling that our layers compute in the same pass) or gets its
tensor from ``now``. So each path through the model gives what its own code says, seen before or not.

A ``Pending`` never leaves the local variables of rewritten code.
"""

import operator
import sys
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Module

from ..epilogue import Epilogue, MaxPool, Pool, activation_of_call, activation_of_module
from ..errors import SurgeryError
from ..functional import batch_norm
from ..graph.layers import ON_ALL_MODULES
from ..kernels.backend import LARGEST_WINDOW
from ..nn.layer import Fused

# What joins a batch norm: ("activation", its name), ("pool", its windows), or NOTHING, which changes nothing.
Step = tuple[str, Any]
NOTHING: Step = ("nothing", None)
#: Functions whose calls may be pending.
BATCH_NORM_FUNCTIONS = (F.batch_norm, torch.batch_norm)


_MODULE_CALL = Module.__call__


def quiet(module: Module) -> bool:
    """Whether a call of the module is one of its class's ``forward``, with nothing before or after."""
    state = module.__dict__
    hooks = (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )
    own = (
        "forward" in state
        or state.get("_compiled_call_impl") is not None
        or type(module).__call__ is not _MODULE_CALL
    )
    return not (hooks or own or any(ON_ALL_MODULES))


def does_nothing_more(layer: Fused) -> bool:
    """Whether the layer itself is a batch norm and nothing else."""
    return layer.activation is None and layer.pool is None


class Joined:
    """What has joined a call of a batch norm so far, in order: a residual, an activation, a pooling."""

    # Not set in __init__: one is made at each call of a rewritten batch norm.
    layer: Any = None
    residual: Any = None
    activation: str | None = None
    pool: Pool = None
    out: Tensor | None = None  # once it has run: then nothing joins any more

    @property
    def images(self) -> bool:
        """Whether the layer normalises images; pooling is for these alone."""
        raise NotImplementedError

    def joins(self, step: Step) -> bool:
        """Take one more step in, if it can follow those that are in already, and nothing has run."""
        kind, setting = step
        if self.out is not None:
            return False
        if kind == "nothing":
            return True
        if self.pool is not None:
            return False
        if kind == "activation":
            if self.activation is not None:
                return False
            self.activation = setting
        elif kind == "residual":
            if self.residual is not None or self.activation is not None:
                return False
            self.residual = setting
        else:
            if not self.images:
                return False
            self.pool = setting
        return True

    def __str__(self) -> str:
        parts = ["residual"] if self.residual is not None else []
        epilogue = str(Epilogue(self.activation, self.pool))
        return " + ".join([*parts, epilogue] if epilogue else parts)


class Pending(Joined):
    """A call of a batch norm, and what has joined it so far."""

    modes: tuple[Any, ...] | None = None  # of a held one
    given: tuple[Any, ...] = ()

    def __init__(self, layer: Fused | None, x: Tensor, given: tuple[Any, ...] = ()) -> None:
        self.layer, self.x = layer, x
        if given:
            self.given = given
        # How often the tensor's memory was written; None where torch does not count.
        self.changes = None if x.is_inference() else x._version

    @property
    def images(self) -> bool:
        """Whether it normalises images."""
        kind = isinstance(self.layer, nn.BatchNorm2d | nn.LazyBatchNorm2d) if self.layer is not None else True
        return kind and self.x.dim() == 4

    def run(self) -> Tensor:
        """The output; it is computed once."""
        if self.out is None:
            if self.modes is None:
                self.out = self._run()
            else:
                self._release()
                with _as_then(self.modes):
                    self.out = self._run()
            if WATCHERS:
                for watcher in WATCHERS:
                    watcher(self)
        return self.out

    def _run(self) -> Tensor:
        if self.changes is not None and self.x._version != self.changes:
            raise SurgeryError(
                "the input of a batch norm was changed in place between its call and what follows it; "
                "convert the model with example=, which finds and leaves such places"
            )
        layer = self.layer
        if layer is None:
            return batch_norm(
                self.x, *self.given, residual=self.residual, activation=self.activation, pool=self.pool
            )
        forward: Callable[..., Tensor] = type(layer).forward
        if forward is not Fused.forward:
            forward = getattr(type(layer), "_normalising", type(layer)).forward
        return forward(layer, self.x, self.residual, activation=self.activation, pool=self.pool)

    def _release(self) -> None:
        if self.layer is not None:
            self.layer.__dict__.pop("_held", None)


#: Called with each ``Pending`` that has run; the observer's way in.
WATCHERS: list[Callable[[Pending], None]] = []


# --- what rewritten code calls ----------------------------------------------------------------------------


def call(callee: Any, *args: Any, **kwargs: Any) -> Any:
    """``callee(*args, **kwargs)``, or a ``Pending`` for it."""
    first = args[0] if args else None
    if type(first) is Pending:
        step = step_of(callee, args[1:], kwargs)
        if step is not None and first.joins(step):
            return first
        first = first.run()
        args = (first, *args[1:])
    if isinstance(callee, Module):
        if type(callee).forward is Fused.forward:
            if len(args) == 1 and not kwargs and type(first) is Tensor and _waits(callee):
                return Pending(callee, first)  # type: ignore[arg-type]
            return callee(*args, **kwargs)
        start = getattr(type(callee), "_pending", None)
        if start is not None:
            if quiet(callee):
                return start(callee, *args, **kwargs)
        elif "_tail" in callee.__dict__:
            return _with_tail(callee, *args, **kwargs)
    elif type(first) is Tensor and (callee is F.batch_norm or callee is torch.batch_norm):
        given = (_plain_arguments if callee is F.batch_norm else _torch_arguments)(*args, **kwargs)
        if given is not None:
            return Pending(None, first, given)
    return callee(*args, **kwargs)


def _waits(layer: Any) -> bool:
    return layer.activation is None and layer.pool is None and quiet(layer)


def method(value: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """``value.name(*args, **kwargs)`` where ``value`` may be pending."""
    if type(value) is Pending:
        step = step_of(name, args, kwargs)
        if step is not None and value.joins(step):
            return value
        if name in ("add", "add_") and len(args) == 1 and not kwargs:
            return (iadd if name == "add_" else add)(value, args[0])
        value = value.run()
    return getattr(value, name)(*args, **kwargs)


def add(one: Any, other: Any) -> Any:
    """``one + other``."""
    if type(one) is Pending:
        if type(other) is Pending:
            other = other.run()
        if _addable(other, one) and one.joins(("residual", other)):
            return one
        return one.run() + other
    if type(other) is Pending:
        if _addable(one, other) and other.joins(("residual", one)):
            return other
        other = other.run()
    return one + other


def _addable(value: Any, to: Pending) -> bool:
    kind = type(value)
    if kind is not Tensor and kind is not nn.Parameter:
        return kind is int or kind is float
    return value.shape == to.x.shape or not _is_statistic(value, to)


def _is_statistic(value: Tensor, of: Pending) -> bool:
    """Whether a tensor has the memory of what the call is to update."""
    held = of.given[:2] if of.layer is None else of.layer._buffers.values()
    here = value.untyped_storage().data_ptr()
    return any(t is not None and t.untyped_storage().data_ptr() == here for t in held)


def iadd(one: Any, other: Any) -> Any:
    """``one += other``; in place, so that the sum has the shape and the dtype of ``one``."""
    if type(other) is Pending:
        other = other.run()
    if type(one) is Pending:
        fits = type(other) is Tensor and other.shape == one.x.shape and other.dtype == one.x.dtype
        if fits and one.joins(("residual", other)):
            return one
        one = one.run()
    return operator.iadd(one, other)  # type: ignore[no-untyped-call]


def now(value: Any) -> Any:
    """The tensor of a ``Pending``; all else as it is."""
    return value.run() if type(value) is Pending else value


def hold(value: Any, known: int = 0, *called: Any) -> Any:
    """Keep a ``Pending`` while other modules run, or run it at once.

    It is kept if nothing but ``known`` local names can reach its input, and the modules ``called`` are plain.
    """
    if type(value) is not Pending or value.out is not None:
        return value
    layer = value.layer
    if value.residual is not None or not _unshared(value, known):
        return value.run()
    for one in called:
        if one is not None and not (plain(one, layer) if isinstance(one, Module) else is_plain_function(one)):
            return value.run()
    if layer is not None and layer.training:
        layer.__dict__["_held"] = weakref.ref(value)
    value.modes = _modes(value.x)
    return value


def _unshared(pending: Pending, known: int) -> bool:
    """Whether no other tensor has the memory of the input, and no other code has the input."""
    x = pending.x
    if sys.getrefcount(x) > _ALONE + known or x._is_view() or x.layout is not torch.strided:
        return False
    # Another tensor on the same memory (`.data`, `.detach()`, NumPy's) holds its storage too.
    return int(torch._C._storage_Use_Count(x.untyped_storage()._cdata)) <= _OWNERS


def _count_alone() -> tuple[int, int]:
    pending = Pending(None, torch.empty(1))
    x = pending.x
    return sys.getrefcount(x), int(torch._C._storage_Use_Count(x.untyped_storage()._cdata))


_ALONE, _OWNERS = _count_alone()


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
    if callee is F.dropout or callee is torch.dropout:
        given = {**dict(zip(("p", "training"), args, strict=False)), **kwargs}
        idle = given.get("training", True) is False or given.get("p", 0.5) == 0
        return NOTHING if idle else None
    return None


def step_of_module(module: Module) -> Step | None:
    """The same for a module that is called with nothing else."""
    name = activation_of_module(module)
    if name is not None:
        return "activation", name
    kind = type(module)
    if kind in IDLE:
        return NOTHING if IDLE[kind](module) else None
    pooling = _POOL_MODULES.get(kind)
    if pooling is not None:
        return _pool_step(pooling, {name: getattr(module, name) for name in pooling})
    name = LEARNED.get(kind)
    return ("activation", name) if name is not None else None


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


# --- layers and functions that normalise ------------------------------------------------------------------


_ARGUMENTS = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_DEFAULTS = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}


def _plain_arguments(_: Tensor, *args: Any, **named: Any) -> tuple[Any, ...] | None:
    """The arguments of ``F.batch_norm`` after the first; None for those that ours does not take."""
    given = {**_DEFAULTS, **dict(zip(_ARGUMENTS, args, strict=False)), **named}
    if len(args) > len(_ARGUMENTS) or given.keys() != {*_ARGUMENTS}:
        return None
    *tensors, training, momentum, eps = (given[name] for name in _ARGUMENTS)
    fits = all(t is None or isinstance(t, Tensor) for t in tensors)
    if not fits or type(momentum) is not float or type(eps) is not float:
        return None
    return (*tensors, bool(training), momentum, eps)


def _torch_arguments(
    x: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, *more: Any, **named: Any
) -> tuple[Any, ...] | None:
    """The same of ``torch.batch_norm``, which has another order."""
    if len(more) != 4 or named:
        return None
    return _plain_arguments(x, running_mean, running_var, weight, bias, *more[:3])


def _with_tail(
    layer: Module,
    input: Tensor,
    residual: Any = None,
    *,
    activation: str | None = None,
    pool: Pool = None,
) -> Tensor:
    """A plain batch norm of torch's, and by torch's operators what it computed besides before."""
    own = layer.__dict__["_tail"]
    epilogue = Epilogue(activation or own.activation, own.pool if pool is None else pool)
    return epilogue.apply(layer(input), residual)


# --- the context of a call --------------------------------------------------------------------------------


def _modes(x: Tensor) -> tuple[Any, ...]:
    device = x.device.type
    return torch.is_grad_enabled(), device, torch.is_autocast_enabled(device)


def _as_then(modes: tuple[Any, ...]) -> ExitStack:
    """The gradients and autocast of the time of a call."""
    gradients, device, autocast = modes
    stack = ExitStack()
    if torch.is_grad_enabled() != gradients:
        stack.enter_context(torch.set_grad_enabled(gradients))
    if torch.is_autocast_enabled(device) != autocast:
        stack.enter_context(torch.autocast(device, enabled=autocast))
    return stack
