"""A module's ``forward`` as a graph of the calls it makes, run once on symbols by ``torch.fx``.

``trace`` is the one tracer; its caller says which modules are single nodes. ``trace_always`` also checks that
the graph describes the ``forward`` fully: the graph must be the same in training and in evaluation mode, no
attribute may change, and no random number may be drawn. ``convolutions_before_batch_norm`` reads pairs of
layers off a graph.
"""

import operator
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph, Node, Proxy, Tracer
from torch.nn import Conv1d, Conv2d, Conv3d, Module

from .. import nn as gbnn
from .layers import BatchNormLayer, hooked

Leaf = Callable[[Module], bool]


class NotAGraph(Exception):  # noqa: N818 - not an error: a finding
    """Why a module's ``forward`` cannot be written as a graph."""


# --- the tracer -------------------------------------------------------------------------------------------

# Every operator of the form `a += b`.
IN_PLACE_OPERATORS = tuple(
    getattr(operator, name) for name in dir(operator) if name.startswith("i") and name[1:] in dir(operator)
)


class _Symbol(Proxy):
    """A proxy that records ``a += b`` as what it is; torch.fx's own makes ``a + b`` of it."""


def _record_in_place(target: Callable[..., Any]) -> Callable[[Proxy, Any], Any]:
    def method(self: Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


for _operator in IN_PLACE_OPERATORS:
    setattr(_Symbol, f"__{_operator.__name__.strip('_')}__", _record_in_place(_operator))


_CONTEXT = "its forward enters a context: no_grad, autocast, checkpoint or the like"
_DEVICES = ("cpu", "cuda")


def _context() -> tuple[object, ...]:
    """The context of a call (gradients, autocast); ``torch.fx`` does not record it."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._autograd._top_saved_tensors_default_hooks(True) is not None,
        *(torch.is_autocast_enabled(device) for device in _DEVICES),
        *(torch.get_autocast_dtype(device) for device in _DEVICES),
    )


class _Tracer(Tracer):
    def __init__(self, leaf: Leaf, contexts: bool) -> None:
        super().__init__()
        self.leaf = leaf
        self.outside = None if contexts else _context()

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        """Record a call, unless a context that a graph cannot hold has been entered around it."""
        if self.outside is not None and _context() != self.outside:
            raise NotAGraph(_CONTEXT)
        return super().create_node(*args, **kwargs)

    def proxy(self, node: Node) -> Proxy:
        """A value of the graph."""
        return _Symbol(node, self)

    def is_leaf_module(self, m: Module, module_qualified_name: str) -> bool:
        """Whether the call of ``m`` is one node."""
        return self.leaf(m)


def is_torch_layer(module: Module) -> bool:
    """Whether the module is one of torch's own, and no ``Sequential``: what torch.fx does not look into."""
    return Tracer().is_leaf_module(module, "")


def trace(module: Module, leaf: Leaf, given: dict[str, Any] | None = None, *, contexts: bool = True) -> Graph:
    """The graph of ``module.forward``, in which each call of a ``leaf`` module is one node.

    Args:
        module: it is called with symbols, in the mode it is in.
        leaf: which modules are not looked into.
        given: arguments of ``forward`` that are these values and not symbols.
        contexts: whether ``forward`` may enter ``no_grad``, autocast and the like, which no graph shows.

    Raises:
        NotAGraph: ``forward`` does what symbols cannot, or enters a context although it may not.
    """
    try:
        return _Tracer(leaf, contexts).trace(module, concrete_args=given or None)
    except NotAGraph:
        raise
    except Exception as error:  # the user's code may do anything with a symbol in place of a value
        text = str(error).strip().splitlines()
        raise NotAGraph(f"its forward cannot be traced ({text[0] if text else error!r})") from error


def module_of(node: Node, root: Module) -> Module | None:
    """The module of ``root`` that a node of its graph calls, or None."""
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


# --- what a forward always does ---------------------------------------------------------------------------


@contextmanager
def _all_switched(on: bool) -> Iterator[None]:
    """Gradients and autocast on or off: whichever a ``forward`` sets, one of the two shows it."""
    before = [torch.is_autocast_enabled(device) for device in _DEVICES]
    with torch.set_grad_enabled(on):
        try:
            for device in _DEVICES:
                torch.set_autocast_enabled(device, on)
            yield
        finally:
            for device, was in zip(_DEVICES, before, strict=True):
                torch.set_autocast_enabled(device, was)


def _opaque(module: Module) -> str | None:
    """Why the code of ``module`` cannot be seen, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if type(module).forward is Module.forward:
        return "it has no forward"
    return None


def _random_states() -> list[object]:
    return [random.getstate(), torch.random.get_rng_state().numpy().tobytes()]


_REGISTERED = ("_parameters", "_buffers", "_modules")


@contextmanager
def _restored(modules: Iterable[Module]) -> Iterator[None]:
    """Put attributes and the registered tensors and modules back as they were."""
    kept = []
    for module in modules:
        state = dict(vars(module))
        kept.append((module, state, {name: dict(state[name]) for name in _REGISTERED}))
    try:
        yield
    finally:
        for module, state, registered in kept:
            for name, entries in registered.items():
                state[name].clear()
                state[name].update(entries)
            vars(module).clear()
            vars(module).update(state)


def _attributes(modules: Iterable[Module]) -> list[dict[str, object]]:
    return [
        {
            name: list(value) if name in _REGISTERED else value
            for name, value in vars(module).items()
            if name != "training"
        }
        for module in modules
    ]


def _same(a: dict[str, object], b: dict[str, object]) -> bool:
    """Whether no attribute came, went or changed; tensors are compared by identity."""
    plain = (bool, int, float, str, list, tuple, dict, set)
    try:
        return a.keys() == b.keys() and all(
            a[name] is b[name] or (isinstance(a[name], plain) and bool(a[name] == b[name])) for name in a
        )
    except RuntimeError:  # a list of tensors that are not the same tensors
        return False


def trace_always(module: Module, through: set[Module]) -> Graph:
    """The graph of ``module.forward`` that is valid in both modes; only the modules ``through`` are opened.

    Raises:
        NotAGraph: saying why there is no such graph.
    """
    seen = [module, *through]
    for one in seen:
        why = _opaque(one)
        if why is not None:
            raise NotAGraph(why)
    graphs: list[Graph] = []
    for training in (True, False):
        with _restored(seen), _all_switched(training), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for one in seen:
                one.training = training
            before, numbers = _attributes(seen), _random_states()
            graphs.append(trace(module, lambda m: m not in through, contexts=False))
            if _random_states() != numbers:
                raise NotAGraph("its forward draws random numbers of its own")
            if not all(_same(a, b) for a, b in zip(before, _attributes(seen), strict=True)):
                raise NotAGraph("its forward changes attributes of the module")
    first, second = (graph.python_code("self").src for graph in graphs)
    if first != second:
        raise NotAGraph("its forward differs between training and evaluation")
    return graphs[0]


# --- a convolution and the batch norm behind it -----------------------------------------------------------

_CONVOLUTIONS = (Conv1d, Conv2d, Conv3d)
_FROZEN = (gbnn.FrozenBatchNorm1d, gbnn.FrozenBatchNorm2d, gbnn.FrozenBatchNorm3d)

Pair = tuple[Any, BatchNormLayer]  # a plain convolution of torch's, and what follows it


def convolutions_before_batch_norm(model: Module) -> list[Pair]:
    """Return the pairs of layers where all that a convolution gives goes into one batch normalization.

    Neither layer has a hook, and no parameter of the convolution is read elsewhere in the model. None of a
    model that ``torch.fx`` cannot trace, whose way through its layers is then not known.
    """
    try:
        graph = trace(model, lambda m: isinstance(m, (*_CONVOLUTIONS, BatchNormLayer)) or is_torch_layer(m))
    except NotAGraph:
        return []
    modules: dict[Node, Any] = {
        node: module for node in graph.nodes if (module := module_of(node, model)) is not None
    }
    read_alone = set()  # what the model's code reads without calling the module that holds it
    for node in graph.find_nodes(op="get_attr"):
        owner, _, name = str(node.target).rpartition(".")
        read_alone.add(id(getattr(model.get_submodule(owner), name)))
    owners = Counter(id(tensor) for module in model.modules() for tensor in module._parameters.values())
    called = Counter(modules.values())
    found = []
    for node, module in modules.items():
        if type(module) not in _CONVOLUTIONS or hooked(module) or len(node.users) != 1:
            continue
        own = [id(tensor) for tensor in module._parameters.values() if tensor is not None]
        alone = called[module] == 1 and all(owners[name] == 1 and name not in read_alone for name in own)
        user = next(iter(node.users))
        if alone and user in modules and _normalizes(modules[user], node, user):
            found.append((module, modules[user]))
    return found


def _normalizes(module: Module, source: Node, user: Node) -> bool:
    """Whether the module subtracts the mean of ``source``, its input (and not its residual, say)."""
    if not isinstance(module, BatchNormLayer) or isinstance(module, _FROZEN) or hooked(module):
        return False
    own_code = not type(module).__module__.startswith(("torch.nn.", "gammabeta.nn."))
    others = (*user.args[1:], *user.kwargs.values())
    return not own_code and user.args[:1] == (source,) and source not in others
