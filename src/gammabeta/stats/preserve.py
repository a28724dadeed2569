"""Run a model without leaving a trace: everything a forward pass may change is put back.

What a model holds is walked from its modules on: their parameters, buffers and other attributes, and what
hangs from these (lists, dictionaries, arrays, generators, recorders, closures of hooks, class attributes).
"""

import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import SurgeryError

Undo = Callable[[], object]
_ATOMS = (int, float, complex, str, bytes, bool, type(None), types.ModuleType, torch.dtype, torch.device)
_WHOLE = (int, float, complex, str, bytes, bool, type(None), tuple, frozenset)  # values of a class attribute
_LIBRARIES = sys.stdlib_module_names | {"torch", "numpy", "builtins", "gammabeta"}


@contextmanager
def preserved(model: nn.Module, loader: Any = None) -> Iterator[None]:
    """Put back what a run of the model changes, whatever happens: tensors, attributes, random state.

    Tensors (parameters, gradients, buffers, those in attributes) are copied and restored in place, so that
    views and shared storage stay connected. ``loader`` may bring random generators of its own.

    Raises:
        SurgeryError: something was changed that cannot be put back; it names it.
    """
    held = _Held()
    for path, module in model.named_modules():
        held.module(path, module)
    put_back_random_state = remember_random_state(loader)
    try:
        yield
    finally:
        put_back_random_state()
        held.put_back()


def set_modes(model: nn.Module, *, training: bool) -> None:
    """Set every module's mode without calling ``train()``, which some models override to do more."""
    for module in model.modules():
        module.training = training


class _Held:
    """Copies of what is reached from modules, and how each is put back."""

    def __init__(self) -> None:
        self.seen: dict[int, Any] = {}  # keeps what it saw alive, so that no id is used twice
        self.undo: list[tuple[str, Undo]] = []
        self.queue: deque[tuple[str, Any]] = deque()

    def module(self, path: str, module: nn.Module) -> None:
        """Hold a module's own attributes and all that hangs from them."""
        if isinstance(module, torch.jit.ScriptModule):  # its attributes are not in a dictionary
            self.undo.append((path, partial(_set_training, module, module.training)))
            for name, tensor in (*module.named_parameters("", False), *module.named_buffers("", False)):
                self.queue.append((f"{path}.{name}".lstrip("."), tensor))
        else:
            self.queue.append((path, module))
        while self.queue:
            self.hold(*self.queue.popleft())

    def put_back(self) -> None:
        """Undo every change, and say at the end what could not be undone."""
        failed: list[tuple[str, Exception]] = []
        for path, undo in self.undo:
            try:
                undo()
            except Exception as error:  # the rest is put back all the same
                failed.append((path, error))
        if failed:
            path, reason = failed[0]
            raise SurgeryError(
                f"running the model changed {path or 'it'} in a way that cannot be undone"
                f" ({str(reason).partition(chr(10))[0]}): run a copy of the model"
            ) from reason

    def hold(self, path: str, value: Any) -> None:
        """Remember one value's content, and queue what it holds."""
        if isinstance(value, _ATOMS) or id(value) in self.seen:
            return
        self.seen[id(value)] = value
        if isinstance(value, Tensor):
            self.tensor(path, value)
        elif isinstance(value, dict):
            self.undo.append((path, partial(_refill, value, dict(value))))
            self.items(path, value.items())
        elif isinstance(value, list | set | deque | bytearray):
            self.undo.append((path, partial(_replace, value, list(value))))
            self.items(path, enumerate(value))
        elif isinstance(value, tuple | frozenset):
            self.items(path, enumerate(value))
        elif isinstance(value, np.ndarray):
            self.undo.append((path, partial(_rewrite, value, value.copy())))
        elif (generator := _generator(value)) is not None:
            self.undo.append((path, generator))
        elif isinstance(value, types.FunctionType | types.MethodType | partial):
            self.function(path, value)
        elif isinstance(value, type):
            self.class_(path, value)
        elif not isinstance(value, torch.jit.ScriptModule):
            self.instance(path, value)

    def items(self, path: str, items: Iterable[tuple[Any, Any]]) -> None:
        for key, item in items:
            if not isinstance(item, _ATOMS):
                self.queue.append((f"{path}[{key}]", item))

    def tensor(self, path: str, tensor: Tensor) -> None:
        if is_lazy(tensor) or tensor.layout is not torch.strided:
            return
        kept = (tensor.detach(), tensor.detach().clone(), tensor.requires_grad)
        self.undo.append((path, partial(_restore, tensor, *kept)))
        if tensor.is_leaf:
            self.undo.append((path, partial(_restore_gradient, tensor, tensor.grad)))
            if tensor.grad is not None:
                self.hold(f"{path}.grad", tensor.grad)

    def function(self, path: str, value: Any) -> None:
        """Hold what a hook writes into: its closure, its object, its bound arguments."""
        if isinstance(value, types.MethodType):
            self.queue.append((path, value.__self__))
        elif isinstance(value, partial):
            self.items(path, enumerate((value.func, *value.args, *value.keywords.values())))
        else:
            for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=False):
                try:
                    content = cell.cell_contents
                except ValueError:  # still empty
                    continue
                self.undo.append((name, partial(setattr, cell, "cell_contents", content)))
                self.queue.append((name, content))

    def class_(self, path: str, class_: type) -> None:
        """Hold what a class of the user's keeps for all its instances."""
        if class_.__module__.partition(".")[0] in _LIBRARIES:
            return
        for name, value in list(vars(class_).items()):
            if name.startswith("__") or callable(value) or isinstance(value, property):
                continue
            if isinstance(value, _WHOLE):
                self.undo.append((f"{path}.{name}", partial(_set_if_changed, class_, name, value)))
            elif isinstance(value, dict | list | set | deque | Tensor | np.ndarray):
                self.queue.append((f"{class_.__name__}.{name}", value))

    def instance(self, path: str, value: Any) -> None:
        """Hold a module's or a plain object's attributes, unless it is a library's own."""
        plain = isinstance(value, nn.Module | types.SimpleNamespace)
        if not (plain or type(value).__module__.partition(".")[0] not in _LIBRARIES):
            return
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self.seen[id(attributes)] = attributes
            self.undo.append((path, partial(_refill, attributes, dict(attributes))))
            for name, item in attributes.items():
                if not isinstance(item, _ATOMS):
                    self.queue.append((f"{path}.{name}".lstrip("."), item))
        for class_ in type(value).__mro__:
            self.hold(class_.__name__, class_)
            slots = vars(class_).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if hasattr(value, name):
                    item = getattr(value, name)
                    self.undo.append((f"{path}.{name}", partial(_set_if_changed, value, name, item)))
                    self.queue.append((f"{path}.{name}", item))


def _set_training(module: nn.Module, training: bool) -> None:
    module.training = training


def _refill(now: dict[Any, Any], before: dict[Any, Any]) -> None:
    if list(now) != list(before):
        now.clear()
        now.update(before)
    for key, value in before.items():
        if now[key] is not value:
            now[key] = value


def _replace(now: Any, before: list[Any]) -> None:
    if len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True)):
        return
    now.clear()
    (now.update if isinstance(now, set) else now.extend)(before)


def _rewrite(now: np.ndarray, before: np.ndarray) -> None:
    if now.dtype.hasobject or now.tobytes() != before.tobytes():
        now[...] = before


def _set_if_changed(owner: Any, name: str, value: Any) -> None:
    if getattr(owner, name, None) is not value:
        setattr(owner, name, value)


def _restore(tensor: Tensor, storage: Tensor, values: Tensor, requires_grad: bool) -> None:
    """Put the memory, the values and ``requires_grad`` of a tensor back."""
    if (tensor.data_ptr(), tensor.shape, tensor.stride()) != (
        storage.data_ptr(),
        storage.shape,
        storage.stride(),
    ):
        tensor.data = storage
    overwrite(tensor, values)
    if tensor.is_leaf and tensor.requires_grad != requires_grad:
        tensor.requires_grad_(requires_grad)


def _restore_gradient(tensor: Tensor, gradient: Tensor | None) -> None:
    if tensor.grad is not gradient:
        tensor.grad = gradient


def overwrite(tensor: Tensor, values: Tensor) -> None:
    """Write ``values`` into ``tensor`` in place, if they differ (comparing bits, so that NaN equals NaN)."""
    if not same_bits(tensor, values):
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(values)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_meta or not a.dtype.is_floating_point:
        return a.is_meta or torch.equal(a, b)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.detach().contiguous().view(integer), b.detach().contiguous().view(integer))


# --- random state -----------------------------------------------------------------------------------------


def _generator(value: Any) -> Undo | None:
    """How the state of a random generator is put back; None for anything else."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    return None


def remember_random_state(*holders: Any) -> Undo:
    """Remember every generator that a forward pass or a loader may draw from; the result puts them back.

    These are the global ones, and those that loaders, their samplers and modules among ``holders`` keep.
    """
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    python = random.getstate()
    numpy = np.random.get_state()  # noqa: NPY002 (the global one is what a loader's transforms use)
    own = [undo for undo in map(_generator, _own_generators(holders)) if undo is not None]

    def put_back() -> None:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for undo in own:
            undo()

    return put_back


def _own_generators(holders: Iterable[Any]) -> Iterator[Any]:
    for holder in holders:
        if isinstance(holder, nn.Module):
            for module in holder.modules():
                yield from vars(module).values()
        else:
            batch_sampler = getattr(holder, "batch_sampler", None)
            for part in (holder, getattr(holder, "sampler", None), getattr(batch_sampler, "sampler", None)):
                yield getattr(part, "generator", None)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run what ``torch.compile`` has compiled as the Python that it was: no graph hides a layer's call."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing has been compiled, and importing it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
