"""See what really flows: run a model once and record which function read which value, and who else read it.

Names and registration order say nothing about a network; calls do. ``watch`` runs the model on the example
under a ``TorchFunctionMode``, which sees every torch function with its tensors, and under hooks, which tell
whose forward is running. The result is a ``Flow``: values (each tensor at one version), calls between them,
and the frames (module calls) they happened in. Known batch-norm modules are recorded as one call each,
unopened.

What a recording cannot show is another path taken on other inputs. So each read of a tensor's *value* by
Python (``if x.sum() > 0``, ``.item()``) marks the frames it happened in; folds do not trust those.
"""

import gc
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

# Functions that tell of a tensor's form, not of its values: neither a use nor a decision on data.
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
_KEEP_CONSTANTS_UP_TO = 1 << 16  # elements; larger derived constants are never per-channel numbers


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
    watchers: list[str] = field(default_factory=list)  # what happens to it beside calls, in words


@dataclass(eq=False)
class Frame:
    """One call of one module."""

    module: nn.Module
    path: str
    parent: "Frame | None"
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    given: tuple[int, tuple[str, ...]] = (0, ())  # positional arguments and keyword names it was called with
    reads: str = ""  # the function by which Python read a data value, if one did
    calls: list["Call"] = field(default_factory=list)  # made by this forward itself, in order

    def chain(self) -> Iterator["Frame"]:
        """Yield this frame and those it runs within, innermost first."""
        frame: Frame | None = self
        while frame is not None:
            yield frame
            frame = frame.parent


@dataclass(eq=False)
class Call:
    """One function call, or one call of a known batch-norm module (``module`` is then set)."""

    function: Callable[..., Any] | None
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    frame: Frame
    module: nn.Module | None = None
    outputs: list[Value] = field(default_factory=list)

    @property
    def data(self) -> list[Value]:
        """The distinct data values it read."""
        return [value for value in self.read if value.origin == "data"]

    @property
    def read(self) -> list[Value]:
        """The distinct values it read; not those whose shape alone it asked for."""
        form = _FORM_ARGUMENTS.get(self.name, ())
        args = [arg for i, arg in enumerate(self.args) if i not in form]
        return list({id(value): value for value in leaves((args, self.kwargs))}.values())


@dataclass
class Flow:
    """Everything one run showed."""

    calls: list[Call]
    frames: list[Frame]
    result: Any
    result_values: list[Value]

    def frames_of(self, module: nn.Module) -> list[Frame]:
        """Every call of a module."""
        return [frame for frame in self.frames if frame.module is module]


def leaves(tree: Any) -> Iterator[Value]:
    """Yield the values in nested arguments."""
    if isinstance(tree, Value):
        yield tree
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from leaves(item)
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from leaves(item)


def tensors_in(tree: Any, depth: int = 0) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists, dicts and plain objects (a model's output class, say)."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors_in(item, depth + 1)
    elif isinstance(tree, tuple | list | set):
        for item in tree:
            yield from tensors_in(item, depth + 1)
    elif depth < 4 and hasattr(tree, "__dict__") and not isinstance(tree, nn.Module | type):
        yield from tensors_in(vars(tree), depth + 1)


def watch(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], leaf: Callable[[nn.Module], bool]
) -> Flow:
    """Run ``model`` (a private copy: hooks come and go) and record; ``leaf`` modules stay unopened."""
    recorder = _Recorder(model, leaf)
    with ExitStack() as stack, torch.no_grad():
        recorder.attach(stack)
        for tensor in tensors_in((args, kwargs)):
            recorder.enter(tensor)
        with recorder:
            result = model(*args, **kwargs)
    return recorder.flow(result)


class _Scripted(nn.Module):
    """Stands before a ScriptModule while the model is watched: what enters it is seen."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.model, self.leaf = model, leaf
        self.quiet = 0
        self.stack: list[Frame] = []
        self.frames: list[Frame] = []
        self.calls: list[Call] = []
        # (value, the tensor's version when it was seen) of every live tensor
        self.known: MutableMapping[Tensor, tuple[Value | None, int]] = WeakIdKeyDictionary()
        self.root = Frame(nn.Module(), "", None)
        names: dict[int, list[str]] = {}
        state = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        for name, tensor in state:
            names.setdefault(id(tensor), []).append(name)
        for _, tensor in state:
            value = Value(tuple(tensor.shape), tensor.dtype, "state", tuple(names[id(tensor)]), tensor)
            self.known[tensor] = (value, _version(tensor))

    # Values ------------------------------------------------------------------------------------------------

    def enter(self, tensor: Tensor) -> Value:
        value = Value(tuple(tensor.shape), tensor.dtype, "data")
        self.known[tensor] = (value, _version(tensor))
        return value

    def value(self, tensor: Tensor) -> Value:
        """The value a tensor holds now; changed unseen, it is a new one of unknown making."""
        entry = self.known.get(tensor)
        if entry is not None and entry[0] is not None and entry[1] == _version(tensor):
            return entry[0]
        return self.enter(tensor)

    def abstract(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return self.value(tree)
        if isinstance(tree, dict):
            return {key: self.abstract(item) for key, item in tree.items()}
        if isinstance(tree, tuple | list):
            return tuple(self.abstract(item) for item in tree)
        return tree

    # Calls -------------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if self.quiet or name in _FORM or name.startswith("_set_grad"):
            return func(*args, **kwargs)
        if name in ("__get__", "__set__") and not isinstance(args[0] if args else None, Tensor):
            return func(*args, **kwargs)
        call = Call(func, name, self.abstract(args), self.abstract(kwargs), self.frame())
        given = list(tensors_in((args, kwargs)))
        result = func(*args, **kwargs)
        self.record(call, given, result)
        return result

    def record(self, call: Call, given: list[Tensor], result: Any) -> None:
        made = list(tensors_in(result))
        changed = [t for t in given if self.known.get(t, (None, -1))[1] != _version(t)]
        new = [t for t in made if t not in self.known] + changed
        if not new and made:  # it handed back what it was given: no call at all
            return
        if not new and not call.data:
            return
        if call.name == "__get__" and not made:  # .shape, .dtype, .device
            return
        if not made and not changed:
            for frame in call.frame.chain():
                frame.reads = frame.reads or call.name
        origin = "data" if call.data or _random(call) else "constant"
        for tensor in new:
            value = Value(tuple(tensor.shape), tensor.dtype, origin, producer=call)
            if origin == "constant" and tensor.numel() <= _KEEP_CONSTANTS_UP_TO:
                value.tensor = tensor
            self.known[tensor] = (value, _version(tensor))
            call.outputs.append(value)
        self.add(call)

    def add(self, call: Call) -> None:
        self.calls.append(call)
        call.frame.calls.append(call)
        for value in call.read:
            value.users.append(call)

    # Frames ------------------------------------------------------------------------------------------------

    def frame(self) -> Frame:
        return self.stack[-1] if self.stack else self.root

    def attach(self, stack: ExitStack) -> None:
        for parent in list(self.model.modules()):
            for name, child in list(parent._modules.items()):
                if isinstance(child, torch.jit.ScriptModule):  # takes no hooks
                    stack.callback(parent._modules.__setitem__, name, child)
                    parent._modules[name] = _Scripted(child)
        for path, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            hooked = _hooks(module)
            before = self.before(path, hooked)
            after = self.after(hooked)
            stack.callback(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)

    def before(self, path: str, hooked: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            frame = Frame(module, path, self.frame(), given=(len(args), tuple(kwargs)))
            self.stack.append(frame)
            if self.quiet:
                self.quiet += 1
                return
            self.frames.append(frame)
            frame.inputs = [self.value(t) for t in tensors_in((args, kwargs))]
            if hooked:
                _tell(frame.inputs, f"is seen by {hooked} on {path or 'the model'}")
            if isinstance(module, _Scripted):
                _tell(frame.inputs, f"goes into {path}, a ScriptModule")
            if self.leaf(module):
                frame.calls.append(
                    Call(None, "module", self.abstract(args), self.abstract(kwargs), frame, module)
                )
                self.quiet = 1

        return hook

    def after(self, hooked: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            frame = self.stack.pop()
            if self.quiet:
                self.quiet -= 1
                if self.quiet:
                    return
                self.record(frame.calls.pop(), list(tensors_in((args, kwargs))), output)
            frame.outputs = [self.value(t) for t in tensors_in(output)]
            if hooked:
                _tell(frame.outputs, f"is seen by {hooked} on {frame.path or 'the model'}")

        return hook

    def flow(self, result: Any) -> Flow:
        values = [self.value(t) for t in tensors_in(result)]
        _tell(values, "is part of the model's output")
        frames, calls = self.frames, self.calls
        out = {id(t) for t in tensors_in(result)}
        out |= {id(t._base) for t in tensors_in(result) if t._base is not None}  # a view keeps what it shows
        gc.collect()
        for tensor, (value, _) in list(self.known.items()):
            if value and value.origin == "data" and value.producer is not None and id(tensor) not in out:
                _tell([value], "is kept after the forward")
        return Flow(calls, frames, result, values)


def _tell(values: list[Value], who: str) -> None:
    for value in values:
        if value.origin == "data" and who not in value.watchers:
            value.watchers.append(who)


def _random(call: Call) -> bool:
    return call.name.startswith(("rand", "bernoulli", "normal", "multinomial", "poisson"))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _hooks(module: nn.Module) -> str:
    """What the user hung on a module that sees or changes what passes, in words; empty when nothing."""
    if module._forward_hooks:
        return "a forward hook"
    if module._forward_pre_hooks:
        return "a forward pre-hook"
    return ""
