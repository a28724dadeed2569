"""Read from a module's ``forward`` what it does to its input, one thing after the other.

The ``forward`` is run once on a stand-in, which notes what is done to it. That is what happens to every
input only if the code can go no other way and does nothing else: no branch, no loop, nothing stored, and no
name but those of children and of a few functions and methods that reshape or activate.
"""

import builtins
import dis
import inspect
from collections.abc import Callable
from functools import partial
from operator import methodcaller
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Link = nn.Module | Callable[[Any], Any]

_METHODS = frozenset({"contiguous", "flatten", "relu", "reshape", "view"})
_FUNCTIONS = (torch.flatten, torch.relu, torch.reshape, F.relu)
_SPACES = {"torch": torch, "nn": nn, "functional": F, "F": F}
_UNFIT = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE
_JUMPS = frozenset(dis.hasjrel) | frozenset(dis.hasjabs)
_DOUBTS = (
    "STORE_ATTR",
    "STORE_SUBSCR",
    "STORE_GLOBAL",
    "DELETE_",
    "COMPARE_",
    "CONTAINS_",
    "IS_",
    "UNARY_NOT",
)


def links_of(module: nn.Module) -> list[Link] | None:
    """What ``module`` does to its one input, in order; None if its code leaves a doubt."""
    kind = type(module)
    if kind.forward is nn.Sequential.forward and kind.__iter__ is nn.Sequential.__iter__:  # type: ignore[attr-defined]
        return [child for child in module._modules.values() if child is not None]
    forward = kind.forward
    if not isinstance(forward, FunctionType) or not _is_straight(forward.__code__):
        return None
    if not all(_is_clear(name, forward, module) for name in forward.__code__.co_names):
        return None
    notes = _Notes()
    try:
        result = forward(_Self(module, notes), notes.last)
    except Exception:  # a model's own code, on stand-ins: whatever it raises, they are not enough for it
        return None
    return notes.links if result is notes.last else None


def _is_straight(code: CodeType) -> bool:
    """Tell whether code of ``self`` and one argument runs from first line to last, and stores nothing."""
    if code.co_argcount != 2 or code.co_kwonlyargcount or code.co_flags & _UNFIT or code.co_exceptiontable:
        return False
    if code.co_freevars or code.co_cellvars or any(isinstance(const, CodeType) for const in code.co_consts):
        return False
    return not any(
        instruction.opcode in _JUMPS or instruction.opname.startswith(_DOUBTS)
        for instruction in dis.get_instructions(code)
    )


def _is_clear(name: str, forward: FunctionType, module: nn.Module) -> bool:
    """Tell whether a name in the code can only mean a child, or what ``_Value`` notes."""
    if hasattr(builtins, name):
        return False
    if name in forward.__globals__:
        found = forward.__globals__[name]
        if found is not _SPACES.get(name) and not any(found is function for function in _FUNCTIONS):
            return False
    if name in module._modules:
        return name not in vars(module) and not hasattr(type(module), name)
    known = name in _METHODS or name in _SPACES or any(name == function.__name__ for function in _FUNCTIONS)
    return known and not hasattr(module, name)


class _Notes:
    """What was done, in order, each time to what came of the time before."""

    def __init__(self) -> None:
        self.links: list[Link] = []
        self.last = _Value(self)

    def take(self, link: Link, given: object, *settings: object) -> "_Value":
        if given is not self.last or not all(map(_is_literal, settings)):
            raise TypeError("no chain: an earlier value is used again, or two values at once")
        self.links.append(link)
        self.last = _Value(self)
        return self.last


class _Self:
    """Stands for the module."""

    def __init__(self, module: nn.Module, notes: _Notes) -> None:
        self._children, self._notes = module._modules, notes

    def __getattr__(self, name: str) -> Callable[[object], "_Value"]:
        child = self._children[name]
        if child is None:
            raise TypeError(f"{name} is None")
        return partial(self._notes.take, child)


class _Value:
    """Stands for a tensor."""

    def __init__(self, notes: _Notes) -> None:
        self._notes = notes

    def __getattr__(self, name: str) -> Callable[..., "_Value"]:
        if name not in _METHODS:
            raise AttributeError(name)

        def method(*args: object, **kwargs: object) -> _Value:
            return self._notes.take(methodcaller(name, *args, **kwargs), self, *args, *kwargs.values())

        return method

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> "_Value":
        if not any(function is known for known in _FUNCTIONS) or not isinstance(args[0], _Value):
            raise TypeError(f"{function} is not known")
        (value, *rest), kwargs = args, kwargs or {}
        call = _Later(function, tuple(rest), kwargs)
        noted: _Value = value._notes.take(call, value, *rest, *kwargs.values())
        return noted


class _Later:
    """A function with all but its first argument."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs

    def __call__(self, x: Any) -> Any:
        return self.function(x, *self.args, **self.kwargs)


def _is_literal(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_literal, value))
    return value is None or isinstance(value, int | str)
