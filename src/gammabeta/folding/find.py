"""Find the linear operations and per-channel affine maps in a recording, and which of them meet.

Between a convolution and its batch norm may stand operations that a per-channel map passes through unchanged:
reshapes and transposes, dropout in evaluation, mean pooling, interpolation, padding that copies. Anything
else, or a second reader, ends the walk with a reason.
"""

import copy
from collections.abc import Container
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..graph.record import Call, Forward, Recording, Value
from ..graph.trace import NotAGraph, is_torch_layer, trace
from ..nn.layer import Fused
from .affine import Affine, Operation

_CONV = ("stride", "padding", "dilation", "groups")
_TRANSPOSE = ("stride", "padding", "output_padding", "groups", "dilation")
_LINEAR: dict[Any, tuple[Operation, tuple[str, ...]]] = {F.linear: (Operation("linear", 0), ())}
for _n in (1, 2, 3):
    _LINEAR[getattr(F, f"conv{_n}d")] = (Operation("conv", _n), _CONV)
    _LINEAR[getattr(F, f"conv_transpose{_n}d")] = (Operation("conv_transpose", _n), _TRANSPOSE)
_AFTER = ("activation", "pool", "residual")  # what a fused batch norm may do after the map
_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_TORCH_BATCH_NORM = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
_ELEMENTWISE = {
    "mul", "mul_", "multiply", "add", "add_", "sub", "sub_", "subtract", "div", "div_", "divide",
    "true_divide", "rsub", "neg", "addcmul", "addcmul_", "batch_norm", "to", "float", "double", "type_as",
}  # fmt: skip


@dataclass(eq=False)
class Linear:
    """A convolution, transposed convolution or Linear call whose weight the model holds."""

    call: Call
    op: Operation
    data: Value
    weight: Value
    bias: Value | None

    @property
    def path(self) -> str:
        """The module that called it, or the weight's own name where a larger forward did."""
        module, path = self.call.forward.module, self.call.forward.path
        if self.weight.names and not isinstance(module, _ConvNd | nn.Linear):
            return self.weight.names[0]
        return path or type(module).__name__


@dataclass(eq=False)
class Norm:
    """A per-channel affine map on dimension 1: an evaluation-mode batch norm, or an equivalent.

    ``affine``: the map, or why it is not known. ``tail``: whether the same call goes on with an activation,
    residual or pool.
    """

    name: str
    kind: str  # "module", "function" or "affine": a module whose operations come to one multiply-add
    path: str
    call: Call
    data: Value
    affine: Affine | str
    tail: bool = False


def is_known_norm(module: nn.Module) -> bool:
    """Tell whether a module's forward is the batch norm its attributes say, and nothing else.

    A subclass that overrides ``forward`` is opened instead, and its ``batch_norm`` call found inside.
    """
    own = type(module).forward
    if own is Fused.forward:
        return True
    return isinstance(module, _BatchNorm) and own in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def find_linears(recording: Recording) -> dict[Call, Linear]:
    """Every linear operation whose weight is one the model holds, or computes from what it holds."""
    found = {}
    for call in recording.calls:
        if call.function not in _LINEAR or not call.outputs:
            continue
        op, names = _LINEAR[call.function]
        args = call.named("input", "weight", "bias", *names)
        data, weight, bias = args.pop("input"), args.pop("weight"), args.pop("bias", None)
        if isinstance(weight, Value) and weight.origin != "data":
            found[call] = Linear(call, Operation(op.kind, op.spatial, args), data, weight, bias)
    return found


def find_norms(recording: Recording, model: nn.Module) -> list[Norm]:
    """Every batch norm that ran, in order, and the modules that are affine in effect."""
    norms = [norm for call in recording.calls if (norm := _norm(call, model)) is not None]
    taken = {norm.call.forward for norm in norms}
    others = (_affine_module(forward, recording) for forward in recording.forwards if forward not in taken)
    norms += [norm for norm in others if norm is not None]
    order = {call: i for i, call in enumerate(recording.calls)}
    return sorted(norms, key=lambda norm: order[norm.call])


def _norm(call: Call, model: nn.Module) -> Norm | None:
    if not call.outputs or (call.module is None and call.name != "batch_norm"):
        return None
    args, path = batch_norm_arguments(call), call.forward.path
    data = args.get("input", args.get("x"))
    if not isinstance(data, Value):
        return None
    tail = any(args.get(name) is not None for name in _AFTER)
    if call.module is not None:
        tail = tail or len(call.args) > 1 or _goes_on(call.module)
        affine = _module_affine(call.module)
        if any(args.get(name) is not None for name in ("mask", "lengths")):
            affine = "it is given a mask, and gives 0 where nothing is kept"
        return Norm(path or type(call.module).__name__, "module", path, call, data, affine, tail)
    if data.origin != "data":
        return None
    affine, owner = _call_affine(args), _owner(args.get("running_mean"), model)
    if owner not in (None, path) and call.inside is model.get_submodule(owner or ""):
        # its .forward was called directly; a parent that reads its buffers makes a call of its own
        return Norm(owner, "module", owner, call, data, affine, tail or _goes_on(call.inside))
    same = [c for c in call.forward.calls if c.name == "batch_norm"]
    name = (path or "forward") + ":batch_norm" + (f"[{same.index(call)}]" if len(same) > 1 else "")
    return Norm(name, "function", path, call, data, affine, tail)


def batch_norm_arguments(call: Call) -> dict[str, Any]:
    """The arguments of a batch norm by name: ``torch.batch_norm`` has an order of its own."""
    return call.named(*(_TORCH_BATCH_NORM if call.function is torch.batch_norm else _BATCH_NORM))


def _goes_on(module: Any) -> bool:
    """Whether a batch norm of ours does more than its map."""
    return any(getattr(module, name, None) is not None for name in ("activation", "pool"))


def _owner(mean: Any, model: nn.Module) -> str | None:
    """The path of the known batch norm that a running mean belongs to."""
    if not isinstance(mean, Value) or not mean.names:
        return None
    path = mean.names[0].rpartition(".")[0]
    return path if is_known_norm(model.get_submodule(path)) else None


def _module_affine(module: Any) -> Affine | str:
    mean, var = module.running_mean, module.running_var
    if mean is None or var is None:
        return "it keeps no running statistics, so it normalises each batch by that batch's own"
    return _finite(Affine.of(mean, var, module.weight, module.bias, float(module.eps)))


def _call_affine(args: dict[str, Any]) -> Affine | str:
    if args.get("training", False) or args.get("running_mean") is None or args.get("running_var") is None:
        return "it normalises each batch by that batch's own statistics"
    numbers: list[Any] = []
    for name in ("running_mean", "running_var", "weight", "bias"):
        value = args.get(name)
        if value is not None and (value.origin == "data" or value.tensor is None):
            return f"its {name} is computed from the input"
        numbers.append(None if value is None else value.tensor)
    mean, var, weight, bias = numbers
    return _finite(Affine.of(mean, var, weight, bias, float(args.get("eps", 1e-5))))


def _finite(affine: Affine) -> Affine | str:
    return affine if affine.finite else "its running statistics or parameters are not finite"


def _affine_module(forward: Forward, recording: Recording) -> Norm | None:
    """A module that multiplies and adds per channel, whatever its name: a frozen batch norm, a scale layer.

    Its calls must form one chain of element-wise arithmetic with constants; the numbers are then read off by
    running it on zeros and on ones in float64, and used only if a random input agrees.
    """
    calls = [call for call in forward.calls if call.data]
    data = [value for value in forward.inputs if value.origin == "data"]
    if not calls or len(data) != 1 or len(forward.outputs) != 1 or forward.given != (1, ()) or forward.reads:
        return None
    if forward.module is recording.forwards[0].module or any(f.parent is forward for f in recording.forwards):
        return None
    value = data[0]
    for call in calls:
        if call.name not in _ELEMENTWISE or call.data != [value] or len(call.outputs) != 1:
            return None
        value = call.outputs[0]
    if value is not forward.outputs[0]:
        return None
    try:
        affine = _read_off(forward.module, data[0].shape)
    except Exception:  # a module's own code, in a dtype that it may not expect: then it is not recognised
        return None
    if affine is None:
        return None
    return Norm(forward.path, "affine", forward.path, calls[-1], data[0], affine)


def _read_off(module: nn.Module, shape: tuple[int, ...]) -> Affine | None:
    if len(shape) < 2:
        return None
    twin = copy.deepcopy(module).double()
    device = next((t.device for t in (*twin.parameters(), *twin.buffers())), torch.device("cpu"))
    with torch.no_grad():
        zeros = torch.zeros(1, *shape[1:], dtype=torch.float64, device=device)
        shift = twin(zeros)
        scale = twin(zeros + 1) - shift
        x = torch.linspace(-3, 5, zeros.numel(), dtype=torch.float64, device=device).view_as(zeros)
        y = twin(x)
    if y.shape != x.shape:
        return None
    flat_scale, flat_shift = (t.transpose(0, 1).flatten(1) for t in (scale, shift))
    same = torch.equal(flat_shift, flat_shift[:, :1].expand_as(flat_shift))
    affine = Affine(flat_scale[:, 0].clone(), flat_shift[:, 0].clone())
    close = torch.allclose(y, x * scale + shift, rtol=1e-9, atol=1e-9)
    steady = torch.allclose(flat_scale, flat_scale[:, :1].expand_as(flat_scale), rtol=1e-9, atol=1e-9)
    return affine if same and close and steady and affine.finite else None


def flows_alike(model: nn.Module) -> bool:
    """Tell whether torch.fx traces the model: then every input flows as the example does."""
    try:
        with torch.no_grad():
            trace(model, lambda m: is_known_norm(m) or is_torch_layer(m))
    except NotAGraph:
        return False
    return True


# --- from a value to what reads it ------------------------------------------------------------------------

_SAME = {"contiguous", "clone", "detach", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
         "feature_alpha_dropout", "to", "type_as", "float", "double", "half", "bfloat16"}  # fmt: skip
_VIEW = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "reshape_as", "view_as",
         "__getitem__"}  # fmt: skip
_ORDER = {"transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis"}
# Spatial dimensions of each mean pooling.
_MEAN_POOL = {f"{kind}avg_pool{n}d": n for kind in ("", "adaptive_") for n in (1, 2, 3)}
_POOL = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


@dataclass(frozen=True)
class Arrival:
    """Where a value arrives: the call that reads it, and how its channels lie there.

    Channel ``c`` occupies indices ``c * repeat`` to ``(c + 1) * repeat - 1`` of dimension ``axis``.
    """

    call: Call
    value: Value
    axis: int
    repeat: int


def follow(value: Value, axis: int, ends: Container[Call]) -> Arrival | str:
    """Walk from ``value``, whose channels are on ``axis``, to the first call in ``ends``.

    Where none is reached, say why, as a predicate of the value.
    """
    repeat = 1
    while True:
        if value.watchers:
            return value.watchers[0]
        if len(value.users) != 1:
            names = " and ".join(sorted({describe(user) for user in value.users}))
            return f"is used {len(value.users)} times, by {names}" if names else "is not used"
        call = value.users[0]
        if call in ends:
            return Arrival(call, value, axis, repeat)
        passed = _through(call, value, axis, repeat)
        if passed is None:
            return f"goes into {describe(call)}"
        value, axis, repeat = passed


def describe(call: Call) -> str:
    """Name a call for a reader: the module it is, or the function and the module it stands in."""
    path = call.forward.path
    if call.module is not None:
        return path or type(call.module).__name__
    return f"{call.name.strip('_')} in {path}" if path else call.name.strip("_")


def _through(call: Call, value: Value, axis: int, repeat: int) -> tuple[Value, int, int] | None:
    """Carry the channels across one call; None if a per-channel map does not pass through it unchanged."""
    if len(call.outputs) != 1 or not call.args or call.args[0] is not value:
        return None
    out = call.outputs[0]
    new_axis: int | None = None
    if call.name in _SAME:
        new_axis = axis if out.dtype == value.dtype and out.shape == value.shape else None
    elif repeat == 1 and (call.name in _ORDER or _is_plain_mean(call)):
        new_axis = _reordered(call, len(value.shape), axis)
    elif call.name in _VIEW:
        return _viewed(call, value, out, axis, repeat)
    elif repeat == 1 and _averages(call, value, axis):
        new_axis = axis if len(out.shape) == len(value.shape) else None
    return None if new_axis is None else (out, new_axis, repeat)


def _reordered(call: Call, dims: int, axis: int) -> int | None:
    """Try the same call on an empty tensor whose sizes are all different, and look where the axis went."""
    if call.function is None:
        return None
    sizes = [i + 2 for i in range(dims)]
    moved = call.function(torch.empty(sizes, device="meta"), *call.args[1:], **call.kwargs)
    shape = list(moved.shape)
    return shape.index(axis + 2) if axis + 2 in shape else None


def _is_plain_mean(call: Call) -> bool:
    return call.name == "mean" and not call.kwargs.keys() & {"dtype", "out"}


def _viewed(call: Call, value: Value, out: Value, axis: int, repeat: int) -> tuple[Value, int, int] | None:
    """Find the dimension that starts where the channels started, if it holds whole channels."""
    if call.name == "__getitem__" and prod(out.shape) != prod(value.shape):
        return None
    before, channels = prod(value.shape[:axis]), value.shape[axis] // repeat
    for i, size in enumerate(out.shape):
        starts = prod(out.shape[:i]) == before
        if starts and size and size % channels == 0 and (size > 1 or channels == 1):
            inner = prod(out.shape[i + 1 :])
            if size // channels * inner == repeat * prod(value.shape[axis + 1 :]):
                return out, i, size // channels
    return None


def _averages(call: Call, value: Value, axis: int) -> bool:
    """Tell whether a spatial operation keeps constants: every output is a weighted mean of inputs."""
    dims = len(value.shape)
    if call.name in _MEAN_POOL:
        given = call.named(*_POOL)
        padding = given.get("padding", 0)
        padded = any(padding) if isinstance(padding, tuple | list) else bool(padding)
        whole = not padded and not given.get("ceil_mode", False) and given.get("divisor_override") is None
        return whole and axis == dims - 1 - _MEAN_POOL[call.name]
    if call.name == "pad":
        given = call.named("input", "pad", "mode")
        copies = given.get("mode", "constant") in ("reflect", "replicate", "circular")
        return copies and axis < dims - len(given.get("pad", ())) // 2
    return call.name == "interpolate" and axis == 1
