"""Run a model once and record which function read which value, and what else read it.

Names and registration order do not say how a network computes; calls do. ``record`` runs the model under a
``TorchFunctionMode``, which sees every torch function with its tensors, and under hooks, which say whose
forward is running. The result is a ``Recording``: values (each tensor at one version), the calls between
them, and the forwards (runs of modules) they happened in. A ``leaf`` module is recorded as one call.

A recording cannot show which branch another input takes. So each read of a tensor's *value* by Python
(``if x.sum() > 0``, ``.item()``) marks the forwards in which it happened; folds do not trust those.
"""

import copy
import gc
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import UsageError
from .layers import hook_on

# Functions that return a tensor's form, not its values: neither a use nor a decision on data.
_FORM = {
    "size", "dim", "ndimension", "stride", "storage_offset", "numel", "nelement", "element_size",
    "is_contiguous", "is_floating_point", "is_complex", "get_device", "__len__", "__hash__", "is_same_size",
    "result_type", "is_pinned", "is_inference", "is_conj", "is_neg", "type", "untyped_storage", "data_ptr",
    "__repr__", "is_nested", "is_signed", "requires_grad_", "is_shared", "dense_dim", "has_names",
    "is_set_to", "is_autocast_enabled", "is_tensor", "is_storage",
}  # fmt: skip
# Arguments read for their shape or dtype only, by position.
_FORM_ARGUMENTS = {"reshape_as": {1}, "view_as": {1}, "expand_as": {1}, "type_as": {1}} | {
    f"{name}_like": {0} for name in ("zeros", "ones", "empty", "full", "rand", "randn", "randint")
} | {f"new_{name}": {0} for name in ("zeros", "ones", "empty", "full", "tensor")}  # fmt: skip
_RANDOM = ("rand", "bernoulli", "normal", "multinomial", "poisson")
_KEEP_CONSTANTS_UP_TO = 1 << 16  # elements; larger derived constants are never per-channel numbers

T = TypeVar("T")


# --- what is recorded -------------------------------------------------------------------------------------


@dataclass(eq=False)
class Value:
    """One tensor at one version.

    ``origin``: "data" (depends on the input), "state" (a parameter or buffer) or "constant" (computed from
    neither input nor chance, as far as the recording shows).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str
    names: tuple[str, ...] = ()  # of a state: every path under which the model holds it
    tensor: Tensor | None = None  # of a state or a small constant
    producer: "Call | None" = None
    users: list["Call"] = field(default_factory=list)
    watchers: list[str] = field(default_factory=list)  # what else happens to it than calls, in words


@dataclass(eq=False)
class Forward:
    """One run of a module's ``forward``."""

    module: nn.Module
    path: str
    parent: "Forward | None"
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    given: tuple[int, tuple[str, ...]] = (0, ())  # positional arguments and keyword names it was called with
    reads: str = ""  # the function by which Python read a data value, if one did
    calls: list["Call"] = field(default_factory=list)  # made by this forward itself, in order

    def outwards(self) -> Iterator["Forward"]:
        """Yield this forward and those it runs within, innermost first."""
        forward: Forward | None = self
        while forward is not None:
            yield forward
            forward = forward.parent


@dataclass(eq=False)
class Call:
    """One function call, or one call of a leaf module (``module`` is then set).

    A call that returns the tensor it was given, as dropout does in evaluation, has no outputs, and is not
    among the users of what it read.
    """

    function: Callable[..., Any] | None
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    forward: Forward
    module: nn.Module | None = None
    outputs: list[Value] = field(default_factory=list)
    inside: nn.Module | None = None  # of a batch norm: the module whose ``forward`` made it, called or not

    def named(self, *names: str) -> dict[str, Any]:
        """Its arguments by name; ``names`` are those of the positional ones, in order."""
        return dict(zip(names, self.args, strict=False)) | self.kwargs

    @property
    def data(self) -> list[Value]:
        """The distinct data values it read."""
        return [value for value in self.read if value.origin == "data"]

    @property
    def read(self) -> list[Value]:
        """The distinct values it read; not those whose shape alone it asked for."""
        form = _FORM_ARGUMENTS.get(self.name, ())
        args = [arg for i, arg in enumerate(self.args) if i not in form]
        return list({id(value): value for value in leaves((args, self.kwargs), Value)}.values())


@dataclass
class Recording:
    """Everything one run showed, in the order it happened."""

    calls: list[Call]
    forwards: list[Forward]


def leaves(tree: Any, kind: type[T] | tuple[type[T], ...], depth: int = 0) -> Iterator[T]:
    """Yield all of a kind in nested tuples, lists, dicts and plain objects (a model's output class, say)."""
    if isinstance(tree, kind):
        yield tree
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from leaves(item, kind, depth + 1)
    elif isinstance(tree, tuple | list | set):
        for item in tree:
            yield from leaves(item, kind, depth + 1)
    elif depth < 4 and hasattr(tree, "__dict__") and not isinstance(tree, Tensor | nn.Module | type):
        yield from leaves(vars(tree), kind, depth + 1)
    elif depth < 4 and hasattr(tree, "__slots__"):
        held = [getattr(tree, name, None) for name in tree.__slots__ if isinstance(name, str)]
        yield from leaves(held, kind, depth + 1)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, dicts and plain objects."""
    return leaves(tree, Tensor)


def map_tensors(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return nested tuples, lists, mappings and dataclasses with ``function`` of each tensor in its place.

    Each keeps its type, as far as a copy of it can be filled anew.
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        mapped = {key: map_tensors(item, function) for key, item in tree.items()}
        return mapped if type(tree) is dict else _refilled(tree, mapped)
    if is_dataclass(tree) and not isinstance(tree, type | nn.Module):
        made = copy.copy(tree)
        for name in (one.name for one in fields(tree) if hasattr(tree, one.name)):
            object.__setattr__(made, name, map_tensors(getattr(tree, name), function))
        return made
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(item, function) for item in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(item, function) for item in tree)
    return tree


Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # positional arguments, and those by keyword


def as_inputs(example: Any) -> Inputs:
    """The arguments that an example stands for.

    A tuple holds positional ones, a dict of names keyword ones; anything else is one argument: a tensor, a
    namedtuple, a dataclass, a list of images. Tensors come without a history, and not of inference mode.

    Raises:
        UsageError: it is a number, a text, nothing, or a dict whose keys are no names.
    """
    inputs: Inputs = (example,), {}
    if isinstance(example, tuple) and not hasattr(example, "_fields"):
        inputs = example, {}
    elif isinstance(example, dict) and all(isinstance(key, str) for key in example):
        inputs = (), dict(example)
    elif example is None or isinstance(example, dict | str | bytes | int | float):
        kind = type(example).__name__
        raise UsageError(
            f"example must be a tensor, a tuple of arguments or a dict of keyword ones, not {kind}"
        )
    plain: Inputs = map_tensors(inputs, lambda t: t.detach().clone() if t.is_inference() else t.detach())
    return plain


def _refilled(tree: Any, mapped: dict[Any, Any]) -> Any:
    """A copy of a mapping of some other class than ``dict``, with these items."""
    try:
        made = copy.copy(tree)
        for key, item in mapped.items():
            made[key] = item
    except Exception:  # a mapping that cannot be copied or written: a plain one has the same items
        return mapped
    return made


# --- the recorder -----------------------------------------------------------------------------------------


def record(
    model: nn.Module, run: Callable[[], Any], leaf: Callable[[nn.Module], bool], *, kept: bool = True
) -> Recording:
    """Record ``run()``, which calls ``model`` without gradients; hooks exist during the run only.

    Args:
        model: the module whose parameters, buffers and forwards are known by their paths.
        run: returns the model's output.
        leaf: tells which modules are not opened.
        kept: whether to look for other tensors than the result that outlive the run; that collects garbage.
    """
    recorder = _Recorder(model, leaf)
    with ExitStack() as stack, torch.no_grad():
        recorder.attach(stack)
        with recorder:
            result = run()
    recorder.tell_of_the_result(list(tensors_in(result)), kept)
    return Recording(recorder.calls, recorder.forwards)


class _Scripted(nn.Module):
    """Replaces a ScriptModule while the model is recorded, so that its inputs are seen."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.model, self.leaf = model, leaf
        self.quiet = 0  # how deep inside a leaf
        self.stack: list[Forward] = [Forward(nn.Module(), "", None)]  # what happens outside the model
        self.forwards: list[Forward] = []
        self.calls: list[Call] = []
        # (value, the tensor's version when it was seen) of every live tensor
        self.known: MutableMapping[Tensor, tuple[Value, int]] = WeakIdKeyDictionary()
        names: dict[int, list[str]] = {}
        state = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        for name, tensor in state:
            names.setdefault(id(tensor), []).append(name)
        for _, tensor in state:
            self.remember(tensor, "state", names=tuple(names[id(tensor)]), tensor=tensor)

    # Values

    def remember(self, tensor: Tensor, origin: str, /, **about: Any) -> Value:
        value = Value(tuple(tensor.shape), tensor.dtype, origin, **about)
        self.known[tensor] = (value, _version(tensor))
        return value

    def value(self, tensor: Tensor) -> Value:
        """The value a tensor holds now; if it is new, or was changed unseen, its origin is unknown."""
        entry = self.known.get(tensor)
        if entry is not None and entry[1] == _version(tensor):
            return entry[0]
        return self.remember(tensor, "data")

    # Calls

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if self.quiet or name in _FORM or name.startswith("_set_grad"):
            return func(*args, **kwargs)
        if name in ("__get__", "__set__") and not isinstance(args[0] if args else None, Tensor):
            return func(*args, **kwargs)
        values, named = map_tensors((args, kwargs), self.value)
        call = Call(func, name, values, named, self.stack[-1])
        if name == "batch_norm":
            call.inside = _running_forward()
        given = list(tensors_in((args, kwargs)))
        result = func(*args, **kwargs)
        self.enter(call, given, result)
        return result

    def enter(self, call: Call, given: list[Tensor], result: Any) -> None:
        made = list(tensors_in(result))
        changed = [t for t in given if t not in self.known or _writes(call, t, self.known[t][1], made)]
        new = [t for t in made if t not in self.known] + changed
        if not new and made:  # it returned what it was given
            self.calls.append(call)
            return
        if not new and not call.data:
            return
        if call.name == "__get__" and not made:  # .shape, .dtype, .device
            return
        if not made and not changed:
            for forward in call.forward.outwards():
                forward.reads = forward.reads or call.name
        origin = "data" if call.data or call.name.startswith(_RANDOM) else "constant"
        for tensor in new:
            small = origin == "constant" and tensor.numel() <= _KEEP_CONSTANTS_UP_TO
            value = self.remember(tensor, origin, producer=call, tensor=tensor if small else None)
            call.outputs.append(value)
        self.calls.append(call)
        call.forward.calls.append(call)
        for value in call.read:
            value.users.append(call)

    # Forwards

    def attach(self, stack: ExitStack) -> None:
        for parent in list(self.model.modules()):
            if isinstance(parent, torch.jit.ScriptModule):  # what is in it is not seen
                continue
            for name, child in list(parent._modules.items()):
                if isinstance(child, torch.jit.ScriptModule):  # takes no hooks
                    stack.callback(parent._modules.__setitem__, name, child)
                    parent._modules[name] = _Scripted(child)
        for path, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            hook = hook_on(module)  # before ours are registered
            seen = f"is seen by {hook} on {path or 'the model'}" if hook else ""
            before, after = partial(self.before, path, seen), partial(self.after, seen)
            stack.callback(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)

    def before(
        self, path: str, seen: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A forward begins; ``seen``: the hook of the user's on the module, if there is one, in words."""
        forward = Forward(module, path, self.stack[-1], given=(len(args), tuple(kwargs)))
        self.stack.append(forward)
        if self.quiet:
            self.quiet += 1
            return
        self.forwards.append(forward)
        forward.inputs = [self.value(t) for t in tensors_in((args, kwargs))]
        if seen:
            _tell(forward.inputs, seen)
        if isinstance(module, _Scripted):
            _tell(forward.inputs, f"goes into {path}, a ScriptModule")
        if self.leaf(module):
            values, named = map_tensors((args, kwargs), self.value)
            forward.calls.append(Call(None, "module", values, named, forward, module))
            self.quiet = 1

    def after(self, seen: str, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """The innermost forward ends."""
        forward = self.stack.pop()
        if self.quiet:
            self.quiet -= 1
            if self.quiet:
                return
            self.enter(forward.calls.pop(), list(tensors_in((args, kwargs))), output)
        forward.outputs = [self.value(t) for t in tensors_in(output)]
        if seen:
            _tell(forward.outputs, seen)

    def tell_of_the_result(self, result: list[Tensor], kept: bool) -> None:
        _tell([self.value(t) for t in result], "is part of the model's output")
        if not kept:
            return
        out = {id(t) for t in result}
        out |= {id(t._base) for t in result if t._base is not None}  # a view keeps its base

        def alive() -> list[Value]:
            known = list(self.known.items())
            return [v for t, (v, _) in known if v.producer is not None and id(t) not in out]

        if alive():  # some may only wait for the collector, which takes long where there are many objects
            gc.collect()
            _tell(alive(), "is kept after the forward")


def _running_forward() -> nn.Module | None:
    """The module whose ``forward`` Python is in: no hook tells of ``layer.forward(x)``."""
    frame = inspect.currentframe()
    while frame is not None:
        module = frame.f_locals.get("self") if frame.f_code.co_name == "forward" else None
        if isinstance(module, nn.Module):
            return module
        frame = frame.f_back
    return None


def _tell(values: list[Value], what: str) -> None:
    for value in values:
        if value.origin == "data" and what not in value.watchers:
            value.watchers.append(what)


def _writes(call: Call, tensor: Tensor, version: int, made: list[Tensor]) -> bool:
    """Whether the call wrote into a tensor it was given, which was at ``version`` before."""
    if not tensor.is_inference():
        return tensor._version != version
    in_place = call.kwargs.get("inplace") is True or call.name.strip("_") != call.name
    return in_place and any(tensor is one for one in made)  # it counts no versions


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
