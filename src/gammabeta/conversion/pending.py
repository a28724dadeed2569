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
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Module

from ..epilogue import Epilogue, Pool
from ..errors import SurgeryError
from ..functional import batch_norm
from ..nn.layer import Fused
from .joined import Joined
from .linear import TUNED, output_shape, run_linear
from .steps import is_plain_function, modes_see_calls, plain, quiet, step_of

# As they are now: another function in their place is called, and nothing is known of it.
_BATCH_NORM, _TORCH_BATCH_NORM = F.batch_norm, torch.batch_norm
#: Functions whose calls may be pending.
BATCH_NORM_FUNCTIONS = (_BATCH_NORM, _TORCH_BATCH_NORM)


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
        if self.linear is not None:
            return run_linear(self)
        if self.slope is not None:
            return self._run_with_slope(self.slope)
        if layer is None:
            return batch_norm(
                self.x, *self.given, residual=self.residual, activation=self.activation, pool=self.pool
            )
        return _forward_of(layer)(layer, self.x, self.residual, activation=self.activation, pool=self.pool)

    def _run_with_slope(self, slope: Tensor) -> Tensor:
        layer = self.layer
        if layer is None:
            return F.prelu(batch_norm(self.x, *self.given), slope)
        forward = _forward_of(layer)
        if forward is Fused.forward:
            return Fused.with_prelu(layer, self.x, slope)
        return F.prelu(forward(layer, self.x), slope)

    def _release(self) -> None:
        if self.layer is not None:
            self.layer.__dict__.pop("_held", None)


def _forward_of(layer: Fused) -> Callable[..., Tensor]:
    forward: Callable[..., Tensor] = type(layer).forward
    if forward is not Fused.forward:
        forward = getattr(type(layer), "_normalising", type(layer)).forward
    return forward


#: Called with each ``Pending`` that has run; the observer's way in.
WATCHERS: list[Callable[[Pending], None]] = []


# --- what rewritten code calls ----------------------------------------------------------------------------


def call(callee: Any, *args: Any, **kwargs: Any) -> Any:
    """``callee(*args, **kwargs)``, or a ``Pending`` for it."""
    first = args[0] if args else None
    if type(first) is Pending:
        step = step_of(callee, args[1:], kwargs)
        if step is not None and first.joins(step):
            if step[0] == "norm":  # perhaps of another library's class, with an activation of its own
                for name in getattr(type(callee), "_tail_of", ()):
                    first = call(getattr(callee, name), first)
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
        elif TUNED in callee.__dict__ and type(first) is Tensor and len(args) == 1 and not kwargs:
            return _waiting_linear(callee, first)
    elif type(callee) is MethodType:
        start = getattr(callee.__func__, "unfinished", None)
        if start is not None:
            return start(callee.__self__, *args, **kwargs)
    elif type(first) is Tensor and (callee is _BATCH_NORM or callee is _TORCH_BATCH_NORM):
        given = (_plain_arguments if callee is _BATCH_NORM else _torch_arguments)(*args, **kwargs)
        if given is not None and not modes_see_calls():
            return Pending(None, first, given)
    return callee(*args, **kwargs)


def _waiting_linear(module: Module, x: Tensor) -> Any:
    if not quiet(module) or modes_see_calls():
        return module(x)
    pending = Pending(None, x)
    pending.linear = module
    return pending


def _waits(layer: Any) -> bool:
    return layer.activation is None and layer.pool is None and quiet(layer) and not modes_see_calls()


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
        return (kind is int or kind is float) and to.linear is None
    if to.linear is not None:
        return bool(value.shape == output_shape(to.linear, to.x)) and value.dtype is to.x.dtype
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
        shape = one.x.shape if one.linear is None else output_shape(one.linear, one.x)
        fits = type(other) is Tensor and other.shape == shape and other.dtype == one.x.dtype
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
    # A slope is a tensor that code in between could change; and nothing more would join.
    if value.residual is not None or value.slope is not None or not _unshared(value, known):
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
