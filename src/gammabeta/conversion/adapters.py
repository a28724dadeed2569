"""Batch norms of other libraries: which classes are a batch norm and something after it, or a frozen one.

A class is known by its name, or that of one of its bases, and taken in only after it gave what the row says
on samples. A class that inherits its ``forward`` from PyTorch's batch norms needs no row.
"""

import ast
import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from ..epilogue import ACTIVATIONS
from ..errors import UsageError
from ..graph.source import NotReadable, read
from .pending import Pending, call, now
from .rewrite import Rewritten, subclass
from .steps import IDLE, LEARNED, does_nothing_more, modes_see_calls, note_what_runs

_BUFFERS = ("running_mean", "running_var", "weight", "bias")


@dataclass(frozen=True)
class Row:
    """What a class computes: a batch norm, then the modules in the attributes ``tail``, in order.

    ``frozen``: it always normalises with its running statistics. ``synced``: over all processes.
    """

    name: str
    tail: tuple[str, ...] = ()
    frozen: bool = False
    synced: bool = False


_ROWS: dict[str, Row] = {}
_IDLE_RATES: dict[str, str] = {}  # classes that drop something at random: the attribute with the probability
_CLASSES: dict[Any, type[Module]] = {}


def register_norm(
    name: str, *, tail: tuple[str, ...] = (), frozen: bool = False, synced: bool = False
) -> None:
    """Let ``convert`` take in a class of batch norms.

    Args:
        name: of the class.
        tail: attributes of the module that hold the modules it calls after the normalisation, in order.
        frozen: it always uses ``running_mean``, ``running_var``, ``weight`` and ``bias``, and ``eps``.
        synced: in training its statistics are those of all processes.

    Raises:
        UsageError: ``name`` is not the name of a class.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise UsageError(f"register_norm needs the name of a class, such as 'BatchNormAct2d'; got {name!r}")
    _ROWS[name] = Row(name, tuple(tail), frozen, synced)


for _name in ("BatchNormAct2d", "BatchNormAct3d", "BatchNormAct1d"):  # timm
    register_norm(_name, tail=("drop", "act"))
register_norm("SyncBatchNormAct", tail=("drop", "act"), synced=True)  # timm
register_norm("FrozenBatchNormAct2d", tail=("drop", "act"), frozen=True)  # timm
register_norm("FrozenBatchNorm2d", frozen=True)  # torchvision, timm, detectron2, fvcore, transformers
for _name in ("DetrFrozenBatchNorm2d", "ConditionalDetrFrozenBatchNorm2d", "DeformableDetrFrozenBatchNorm2d",
              "DetaFrozenBatchNorm2d", "GroundingDinoFrozenBatchNorm2d", "RTDetrFrozenBatchNorm2d",
              "DFineFrozenBatchNorm2d", "TableTransformerFrozenBatchNorm2d"):  # fmt: skip
    register_norm(_name, frozen=True)  # transformers
register_norm("NaiveSyncBatchNorm", synced=True)  # detectron2, fvcore
_IDLE_RATES |= {
    "DropPath": "drop_prob",
    "StochasticDepth": "p",
    "DropBlock2d": "drop_prob",
    "DropBlock2D": "drop_prob",
}


def row_of(module: Module) -> Row | None:
    """The row for a module's class or the nearest of its bases that has one."""
    for base in type(module).__mro__:
        if base.__module__.startswith(("torch.nn.", "gammabeta.")):
            continue
        if base.__name__ in _ROWS:
            return _ROWS[base.__name__]
    return None


def inherits_forward(layer: Module) -> bool:
    """Whether a batch norm of another class runs PyTorch's ``forward``."""
    kind = type(layer)
    same_call = kind.__call__ is Module.__call__
    return same_call and kind.forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


# --- batch norms ------------------------------------------------------------------------------------------


class Adapted:
    """Marks a class that is one of ours and one of another library's: its tail follows."""

    _base: type[Module]
    _normalising: Any
    _tail_of: tuple[str, ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not that of the other library's class, as for ``Rewritten``."""

    def _pending(self: Any, input: Any) -> Any:
        value = input
        if type(input) is Tensor and does_nothing_more(self) and not modes_see_calls():
            value = Pending(self, input)
        else:
            value = self._normalising.forward(self, input)
        for name in self._tail_of:
            value = call(getattr(self, name), value)
        return value

    def forward(self: Any, input: Any) -> Any:
        """Normalise, then what the other library's class does."""
        if not torch.compiler.is_compiling():
            return now(self._pending(input))
        value = self._normalising.forward(self, input)
        for name in self._tail_of:
            value = getattr(self, name)(value)
        return value

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self._normalising, self._base, self._tail_of), vars(self)


def _blank(kind: type[Module], base: type[Module], tail: tuple[str, ...]) -> Module:
    made = adapted_class(kind, base, tail)
    module: Module = made.__new__(made)
    return module


def adapted_class(kind: type[Module], base: type[Module], tail: tuple[str, ...]) -> type[Module]:
    """The class that is both ``kind``, one of ours, and ``base``."""
    key = (kind, base, tail)
    if key not in _CLASSES:
        body = {"_base": base, "_normalising": kind, "_tail_of": tail, "__module__": kind.__module__}
        _CLASSES[key] = subclass((Adapted, kind, base), body)
    return _CLASSES[key]


def tail_of(layer: Module) -> tuple[str, ...] | None:
    """The attributes with what a foreign batch norm calls after normalising; None if it is not known."""
    if inherits_forward(layer):
        return ()
    row = row_of(layer)
    if row is None or row.frozen or not _reads_only(layer, row):
        return None
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return row.tail if alone or not row.synced else None


_SETTINGS = {
    "training", "track_running_stats", "num_batches_tracked", "momentum", "eps", "affine", "process_group",
    "num_features", "_check_input_dim", "_stats_mode", *_BUFFERS,
}  # fmt: skip


def _reads_only(layer: Module, row: Row) -> bool:
    """Whether the class's own forward reads nothing of the module but what a batch norm has, and its tail."""
    kind: Any = getattr(type(layer), "_base", type(layer))
    try:
        source = read(kind.forward)
    except NotReadable:
        return False
    me = source.tree.args.args[0].arg
    read_of_self = {
        node.attr
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == me
    }
    return read_of_self <= {*_SETTINGS, *row.tail}


def gives_the_same(layer: Module, kind: type[Module], tail: tuple[str, ...]) -> bool:
    """Whether the layer of both classes gives, on samples, what the layer gives."""
    if tail == () and inherits_forward(layer):
        return True
    return _same_on_samples(layer, kind, tail)


def _same_on_samples(layer: Any, kind: type[Module], tail: tuple[str, ...]) -> bool:
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            one = copy.deepcopy(layer).to("cpu", torch.float64)
            other = copy.deepcopy(one)
            other.__class__ = adapted_class(kind, type(layer), tail)
            return all(_alike(one, other, mode, scale) for mode in (False, True) for scale in _SCALES)
    except Exception:  # another library's code may raise anything: it is not taken in
        return False


_SCALES = (1.0, 1e-3, 1e6)  # of the samples


def _alike(one: Any, other: Any, training: bool, scale: float) -> bool:
    dimension = {2: (5, 4), 1: (6,), 3: (3, 4, 2)}
    sizes = next((size for dim, size in dimension.items() if f"{dim}d" in type(one).__name__.lower()), (5, 4))
    x = torch.randn(6, len(one.running_mean), *sizes, dtype=torch.float64, device="cpu") * 2 * scale + 0.5
    one.train(training)
    other.train(training)
    torch.manual_seed(0)
    expected = one(x)
    torch.manual_seed(0)
    found = other(x)
    same = torch.allclose(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    return bool(same) and all(map(torch.allclose, other.buffers(), one.buffers()))


# --- frozen batch norms -----------------------------------------------------------------------------------


class AdaptedFrozen(Rewritten):
    """Marks a subclass of another library's frozen batch norm that runs our function."""

    _tail_of: tuple[str, ...]

    def _pending(self: Any, x: Any) -> Any:
        mean, var, weight, bias = (getattr(self, name) for name in _BUFFERS)
        if type(x) is not Tensor or x.dtype != mean.dtype or modes_see_calls():
            return self._base.forward(self, x)
        value: Any = Pending(None, x, (mean, var, weight, bias, False, 0.0, float(self.eps)))
        for name in self._tail_of:
            value = call(getattr(self, name), value)
        return value

    def forward(self: Any, x: Any) -> Any:
        """Normalise with the running statistics."""
        return self._base.forward(self, x) if torch.compiler.is_compiling() else now(self._pending(x))


def adapt_frozen(module: Module) -> bool:
    """Let a frozen batch norm of another library run our function; whether it is one."""
    row = row_of(module)
    base: type[Module] = getattr(type(module), "_base", type(module))
    if row is None or not row.frozen or isinstance(module, _BatchNorm) or not _reads_only(module, row):
        return False
    if not all(isinstance(getattr(module, name, None), Tensor) for name in _BUFFERS) or not hasattr(
        module, "eps"
    ):
        return False
    key = (base, row.tail, "frozen")
    if key not in _CLASSES:
        _CLASSES[key] = subclass((AdaptedFrozen, base), {"_base": base, "_tail_of": row.tail})
    same = _frozen_gives_the_same(module, _CLASSES[key])
    if same:
        module.__class__ = _CLASSES[key]
    return same


def _frozen_gives_the_same(module: Any, made: type[Module]) -> bool:
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            one = copy.deepcopy(module).to("cpu", torch.float64)
            other = copy.deepcopy(one)
            other.__class__ = made
            return all(_alike(one, other, mode, scale) for mode in (False, True) for scale in _SCALES)
    except Exception:  # another library's code may raise anything: it is not taken in
        return False


# --- activations, and what drops at random ----------------------------------------------------------------

# Names under which other libraries have an activation of ours; a class counts only if it gives the same.
_ACTIVATION_NAMES = {
    "GELU", "GELUActivation", "GELUTanh", "PytorchGELUTanh", "SiLUActivation", "Swish", "SwishMe",
    "MemoryEfficientSwish", "HSwish", "Hswish", "HardSwish", "HardSwishMe", "HardSwishJit", "h_swish", "Mish",
    "MishMe", "MishActivation", "Sigmoid", "Tanh", "HSigmoid", "Hsigmoid", "HardSigmoid", "HardSigmoidMe",
    "h_sigmoid", "ReLUActivation", "ReLU6Activation", "ReLU", "ReLU6", "SiLU", "LeakyReLU",
}  # fmt: skip


def learn(root: Module) -> None:
    """Learn which modules below ``root`` compute an activation of ours, and which drop."""
    for module in root.modules():
        kind: type[Module] = type(module)
        known = kind in IDLE or kind in LEARNED or kind.__module__.startswith("torch.nn.")
        if known or module._modules or module._parameters or module._buffers:
            continue
        rate = _IDLE_RATES.get(kind.__name__)
        if rate is not None and hasattr(module, rate) and _gives_back(module):
            note_what_runs(kind)
            IDLE[kind] = lambda one, rate=rate: not one.training or not getattr(one, rate)  # type: ignore[misc]
        settings = {n for n in vars(module) if not n.startswith("_")} - {"training", "inplace"}
        if kind.__name__ in _ACTIVATION_NAMES and not settings and (name := _activation(module)):
            LEARNED[kind] = name
            note_what_runs(kind)


def _gives_back(module: Module) -> bool:
    twin: Any = copy.deepcopy(module)
    samples = [torch.ones(*sizes, device="cpu") for sizes in ((2, 3, 8, 8), (1, 5), (4, 2, 3))]
    try:
        served = all(twin.eval()(sample) is sample for sample in samples)
        setattr(twin, _IDLE_RATES[type(module).__name__], 0.0)
        return served and all(twin.train()(sample) is sample for sample in samples)
    except Exception:  # another library's code may raise anything
        return False


def _activation(module: Module) -> str | None:
    """The activation that gives the same on samples, with the same derivative, in both modes."""
    special = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e30, -1e30]
    points = torch.cat([torch.linspace(-12, 12, 2401), torch.tensor(special)]).double().view(1, 2, 4, -1)
    try:
        found = [_values(copy.deepcopy(module).train(mode), points) for mode in (True, False)]
    except Exception:  # another library's code may raise anything
        return None
    for name, row in ACTIVATIONS.items():
        expected = _values(row.function, points)
        if all(torch.allclose(f, expected, rtol=1e-6, atol=1e-9, equal_nan=True) for f in found):
            return name
    return None


def _values(function: Any, points: Tensor) -> Tensor:
    """A function's values, and its derivative where it is smooth."""
    with torch.enable_grad():
        leaf = points.clone().requires_grad_()
        out = function(leaf * 1.0)
        (slopes,) = torch.autograd.grad(out.sum(), leaf)
    smooth = points.isfinite() & (points.abs() < 1e3) & (points.frac() != 0)
    return torch.stack([out.detach(), torch.where(smooth, slopes, torch.zeros_like(slopes))])
