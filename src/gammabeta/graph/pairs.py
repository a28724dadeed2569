"""Which convolutions of a model are followed by one batch normalization and by nothing else."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import fx, nn
from torch.nn.modules import module as torch_module

from .. import nn as gbnn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FROZEN = (gbnn.FrozenBatchNorm1d, gbnn.FrozenBatchNorm2d, gbnn.FrozenBatchNorm3d)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ON_ALL_MODULES = tuple(getattr(torch_module, f"_global{name}") for name in _HOOKS)

Pair = tuple[Any, nn.modules.batchnorm._BatchNorm]  # a plain convolution of torch's, and what follows it


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Layers are not looked into."""
        return isinstance(m, (*_CONVOLUTIONS, nn.modules.batchnorm._BatchNorm)) or super().is_leaf_module(
            m, module_qualified_name
        )


def convolutions_before_batch_norm(model: nn.Module) -> list[Pair]:
    """Return the pairs of layers where all that a convolution gives goes into one batch normalization.

    Neither layer has a hook, and no parameter of the convolution is read elsewhere in the model. None of a
    model that ``torch.fx`` cannot trace, whose way through its layers is then not known.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception:  # whatever a forward does that is not for tracing
        return []
    modules: dict[fx.Node, Any] = {
        node: model.get_submodule(str(name)) for node in graph.nodes for name in _called(node)
    }
    used_elsewhere = {id(attribute) for attribute in _attributes(model, graph)}
    owners = Counter(id(tensor) for module in model.modules() for tensor in module._parameters.values())
    found = []
    for node, module in modules.items():
        if type(module) not in _CONVOLUTIONS or hooked(module) or len(node.users) != 1:
            continue
        own = [id(tensor) for tensor in module._parameters.values() if tensor is not None]
        alone = not used_elsewhere & {*own} and all(owners[name] == 1 for name in own)
        user = next(iter(node.users))
        once = list(modules.values()).count(module) == 1
        if alone and once and user in modules and _normalizes(modules[user], node, user):
            found.append((module, modules[user]))
    return found


def _called(node: fx.Node) -> list[Any]:
    return [node.target] if node.op == "call_module" else []


def _attributes(model: nn.Module, graph: fx.Graph) -> Iterator[Any]:
    """What the model's code reads without calling the module that holds it."""
    for node in graph.nodes:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            yield getattr(model.get_submodule(owner), name)


def _normalizes(module: nn.Module, source: fx.Node, user: fx.Node) -> bool:
    """Whether the module subtracts the mean of ``source``, its input (and not its residual, say)."""
    if (
        not isinstance(module, nn.modules.batchnorm._BatchNorm)
        or isinstance(module, _FROZEN)
        or hooked(module)
    ):
        return False
    own_code = not type(module).__module__.startswith(("torch.nn.", "gammabeta.nn."))
    others = (*user.args[1:], *user.kwargs.values())
    return not own_code and user.args[:1] == (source,) and source not in others


def hooked(module: nn.Module) -> bool:
    """Tell whether anything is called with what goes in or comes out of a module, or with its gradients."""
    return any(map(vars(module).get, _HOOKS)) or any(_ON_ALL_MODULES)
