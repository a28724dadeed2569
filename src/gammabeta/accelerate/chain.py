"""Call the layers of a folded ``nn.Sequential`` one after the other, without the modules' calls.

A module's call costs a microsecond or two of Python, and a packed layer asks at each whether anything but
plain eager execution is going on. For one small image that is a quarter of the time. A ``Chain`` sits where
``nn.Module.compile`` puts its product (``_compiled_call_impl``), so that the model's class, ``forward``,
hooks and children stay what they were. It calls the layers directly while that makes no difference: nothing
traces or compiles, no module has a hook, and each module is the one it was. Otherwise it makes the ordinary
call.

Which layer follows which is known for ``nn.Sequential``, and for classes made from it that keep its
``forward``. A model with a ``forward`` of its own is called as always; a ``Sequential`` inside it can be a
chain.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..graph.layers import ON_ALL_MODULES
from .convolution import PackedConv2d
from .packed import PackedLinear, eager

_FEWEST = 4  # modules from which on a chain saves more than it asks; measured
_module_call, _call_impl = nn.Module.__call__, nn.Module._call_impl


class _Layers:
    """The modules of a ``Sequential`` and of those inside it, as they are now, and what they do in order."""

    def __init__(self, module: nn.Module) -> None:
        self.steps: list[Callable[[Any], Any]] = []
        self.modules: list[nn.Module] = []
        self.sequentials: list[dict[str, Any]] = []  # the attributes of those whose children are followed
        self._add(module)
        self.attributes = [vars(found) for found in self.modules]
        self.types = list(map(type, self.modules))
        self.children = self._children()

    def _add(self, module: nn.Module) -> None:
        if not _has_plain_call(module):
            self.steps.append(module)
            return
        self.modules.append(module)
        if _is_sequential(module):
            self.sequentials.append(vars(module))
            for child in module._modules.values():
                self._add(child)  # type: ignore[arg-type]
        elif type(module) is not nn.Identity:
            self.steps.append(_step(module))

    def _children(self) -> list[nn.Module | None]:
        return [child for found in self.sequentials for child in found["_modules"].values()]

    def are_unchanged(self) -> bool:
        """Tell whether the modules are the same, of the same classes."""
        return list(map(type, self.modules)) == self.types and self._children() == self.children

    def are_only_forward(self, chain: "Chain") -> bool:
        """Tell whether a call of each module runs its class's ``forward`` and nothing else."""
        for attributes in self.attributes:
            if (
                attributes["_forward_hooks"]
                or attributes["_forward_pre_hooks"]
                or attributes["_backward_hooks"]
                or attributes["_backward_pre_hooks"]
                or "forward" in attributes
                or attributes.get("_compiled_call_impl", chain) is not chain
            ):
                return False
        return not any(ON_ALL_MODULES) and nn.Module.__call__ is _module_call


def _has_plain_call(module: nn.Module) -> bool:
    """Tell whether its call is that of ``nn.Module``."""
    kind = type(module)
    return (
        kind.__call__ is _module_call
        and kind._call_impl is _call_impl
        and not isinstance(module, torch.jit.ScriptModule)
    )


def _is_sequential(module: nn.Module) -> bool:
    """Tell whether it calls its children in order, each with what the one before gave."""
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and type(module).__iter__ is nn.Sequential.__iter__
        and None not in module._modules.values()
    )


def _step(module: nn.Module) -> Callable[[Any], Any]:
    """What a call of the module runs, without hooks."""
    if type(module) in (PackedConv2d, PackedLinear):
        return module.serve  # type: ignore[return-value]
    if type(module) is nn.Linear:
        return partial(_linear, module._parameters)
    return module.forward


def _linear(parameters: dict[str, Any], x: Tensor) -> Tensor:
    """``nn.Linear``, past ``Module.__getattr__``."""
    return F.linear(x, parameters["weight"], parameters["bias"])


class Chain:
    """Takes the calls of the module that it is attached to."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.layers: _Layers | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module's layers one after the other, or the module as if this were not there."""
        if len(args) == 1 and not kwargs and type(args[0]) is Tensor and eager():
            layers = self.layers
            if layers is None or not layers.are_unchanged():
                layers = self.layers = _Layers(self.module)
            if layers.are_only_forward(self):
                (x,) = args
                for step in layers.steps:
                    x = step(x)
                return x
        return self.module._call_impl(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[[nn.Module], "Chain"], tuple[nn.Module]]:
        """In a copy or a pickle: attach one to the copy of the module."""
        return hang, (self.module,)


def hang(module: nn.Module) -> Chain:
    """Attach a chain to a module. Pickles of version 0.1.0 know this function by its name.

    ``nn.Module`` leaves ``_compiled_call_impl`` out of copies and pickles; the second name takes it there.
    """
    chain = Chain(module)
    vars(module).update(_compiled_call_impl=chain, _chain=chain)
    return chain


def attach_chains(model: nn.Module) -> None:
    """Attach a chain to each outermost ``Sequential`` of ``model`` that has packed layers in it."""
    layers = _Layers(model)
    packed = any(isinstance(module, PackedConv2d | PackedLinear) for module in layers.modules)
    if packed and len(layers.modules) >= _FEWEST:
        for module in layers.modules:  # an earlier fold's
            if isinstance(module._compiled_call_impl, Chain):
                del vars(module)["_compiled_call_impl"], vars(module)["_chain"]
        hang(model)
        return
    for child in model.children():
        attach_chains(child)
