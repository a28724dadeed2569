"""Call the layers of a folded model one after the other, and ask once what each of them would ask.

A module's call costs a microsecond or two of Python, and a packed layer asks at each whether anything but
plain eager execution is going on. For one small image that is a quarter of the time. A ``Chain`` hangs where
``nn.Module.compile`` puts its product (``_compiled_call_impl``), so that the model's class, ``forward``,
hooks and children stay what they were. It calls the layers directly for as long as nobody could tell:
nothing traces or compiles, no hook hangs anywhere, and each module is the one it was. Otherwise it makes the
call that would have been made without it.

Which layers follow one another is learnt from the ``forward`` of each module on the way, where its code
leaves no doubt; see ``links``.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain as joined
from itertools import repeat
from operator import contains, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from ..graph.links import links_of
from .convolution import PackedConv2d
from .packed import PackedLinear, eager

_FEWEST = 4  # modules from which on a chain saves more than it asks; measured
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_EVERYWHERE = tuple(getattr(torch_module, f"_global{name}") for name in _HOOKS)  # hooks on all modules

_hooks_of: Callable[[dict[str, Any]], tuple[Any, ...]] = itemgetter(*_HOOKS)
_children_of: Callable[[dict[str, Any]], dict[str, nn.Module | None]] = itemgetter("_modules")
_module_call, _call_impl = nn.Module.__call__, nn.Module._call_impl


class _Way:
    """The modules met on the way through one, as they are now, and what they do to a tensor in order."""

    def __init__(self, module: nn.Module) -> None:
        self.steps: list[Callable[[Any], Any]] = []
        self.modules: list[nn.Module] = []
        self.opened: list[dict[str, Any]] = []  # the attributes of those whose children stand for them
        self._follow(module)
        self.attributes = [vars(found) for found in self.modules]
        self.types = list(map(type, self.modules))
        self.children = self._children()

    def _follow(self, module: nn.Module) -> None:
        if not _is_plain(module):
            self.steps.append(module)
            return
        self.modules.append(module)
        links = links_of(module)
        if links is None:
            self.steps.append(_step(module))
            return
        self.opened.append(vars(module))
        for link in links:
            if isinstance(link, nn.Module):
                self._follow(link)
            else:
                self.steps.append(link)

    def _children(self) -> list[nn.Module | None]:
        return list(joined.from_iterable(map(dict.values, map(_children_of, self.opened))))

    def holds(self) -> bool:
        """Tell whether the modules are the same, of the same classes."""
        return list(map(type, self.modules)) == self.types and self._children() == self.children

    def bare(self) -> bool:
        """Tell whether to call one of the modules is to call its class's ``forward`` and nothing else."""
        attributes = self.attributes
        return not (
            any(joined.from_iterable(map(_hooks_of, attributes)))
            or any(_EVERYWHERE)
            or any(map(contains, attributes, repeat("forward")))
            or any(map(contains, attributes[1:], repeat("_compiled_call_impl")))  # the first has the chain
            or nn.Module.__call__ is not _module_call
        )


def _is_plain(module: nn.Module) -> bool:
    """Tell whether its call is that of ``nn.Module``."""
    kind = type(module)
    return (
        kind.__call__ is _module_call
        and kind._call_impl is _call_impl
        and not isinstance(module, torch.jit.ScriptModule)
    )


def _step(module: nn.Module) -> Callable[[Any], Any]:
    """What a call of the module comes down to, with nothing hung on it."""
    if type(module) in (PackedConv2d, PackedLinear):
        return module.serve  # type: ignore[return-value]
    if type(module) is nn.Linear:
        return partial(_linear, module._parameters)
    return module.forward


def _linear(parameters: dict[str, Any], x: Tensor) -> Tensor:
    """``nn.Linear``, past ``Module.__getattr__``."""
    return F.linear(x, parameters["weight"], parameters["bias"])


class Chain:
    """Takes the calls of a module it hangs on."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.way: _Way | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module's layers one after the other, or the module as if this were not there."""
        if len(args) == 1 and not kwargs and type(args[0]) is Tensor and eager():
            way = self.way
            if way is None or not way.holds():
                way = self.way = _Way(self.module)
            if way.bare():
                (x,) = args
                for step in way.steps:
                    x = step(x)
                return x
        return self.module._call_impl(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[[nn.Module], "Chain"], tuple[nn.Module]]:
        """In a copy or a pickle: hang one on the copy of the module."""
        return hang, (self.module,)


def hang(module: nn.Module) -> Chain:
    """Hang a chain on a module.

    ``nn.Module`` leaves ``_compiled_call_impl`` out of copies and pickles; the second name takes it there.
    """
    chain = Chain(module)
    vars(module).update(_compiled_call_impl=chain, _chain=chain)
    return chain


def hang_chains(model: nn.Module) -> None:
    """Hang a chain on each module of ``model`` that is one of packed layers and others, outermost first."""
    way = _Way(model)
    packed = any(isinstance(module, PackedConv2d | PackedLinear) for module in way.modules)
    if packed and len(way.modules) >= _FEWEST:
        for module in way.modules:  # an earlier fold's
            if isinstance(module._compiled_call_impl, Chain):
                del vars(module)["_compiled_call_impl"], vars(module)["_chain"]
        hang(model)
        return
    for child in model.children():
        hang_chains(child)
