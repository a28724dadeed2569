"""Follow a value forward to the one operation that reads it, keeping track of where its channels are.

Between a convolution and its batch norm may stand operations that a per-channel map passes through unchanged:
reshapes and transposes, dropout in evaluation, mean pooling, interpolation, padding that copies. Anything
else, or a second reader, ends the walk with a reason.
"""

from collections.abc import Container
from dataclasses import dataclass
from math import prod

import torch

from ..graph.record import Call, Value

_SAME = {"contiguous", "clone", "detach", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
         "feature_alpha_dropout", "to", "type_as", "float", "double", "half", "bfloat16"}  # fmt: skip
_VIEW = {
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "reshape_as",
    "view_as",
    "__getitem__",
}
_ORDER = {"transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis"}
_MEAN_POOL = {"avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3}
_ADAPTIVE = {"adaptive_avg_pool1d": 1, "adaptive_avg_pool2d": 2, "adaptive_avg_pool3d": 3}


@dataclass(frozen=True)
class Link:
    """Where a value arrives: the call that reads it, and how its channels lie there.

    Channel ``c`` occupies indices ``c * repeat`` to ``(c + 1) * repeat - 1`` of dimension ``axis``.
    """

    call: Call
    value: Value
    axis: int
    repeat: int


@dataclass(frozen=True)
class Break:
    """Why a value arrives nowhere, said of the value."""

    reason: str


def follow(value: Value, axis: int, ends: Container[Call]) -> Link | Break:
    """Walk from ``value``, whose channels are on ``axis``, to the first call in ``ends``."""
    channels, repeat = value.shape[axis], 1
    while True:
        if value.watchers:
            return Break(value.watchers[0])
        if len(value.users) != 1:
            names = sorted({describe(user) for user in value.users})
            return Break(
                f"is used {len(value.users)} times, by {' and '.join(names)}" if names else "is not used"
            )
        call = value.users[0]
        if call in ends:
            return Link(call, value, axis, repeat)
        step = _through(call, value, axis, repeat, channels)
        if step is None:
            return Break(f"goes into {describe(call)}")
        value, axis, repeat = step


def describe(call: Call) -> str:
    """Name a call for a reader: the module it is, or the function and the module it stands in."""
    if call.module is not None:
        return call.frame.path or type(call.module).__name__
    path = call.frame.path
    return f"{call.name.strip('_')} in {path}" if path else call.name.strip("_")


def _through(
    call: Call, value: Value, axis: int, repeat: int, channels: int
) -> tuple[Value, int, int] | None:
    """Carry the channels across one call; None if a per-channel map does not pass through it unchanged."""
    if len(call.outputs) != 1 or not call.args or call.args[0] is not value:
        return None
    out = call.outputs[0]
    new_axis: int | None = None
    if call.name in _SAME:
        new_axis = axis if out.dtype == value.dtype and out.shape == value.shape else None
    elif call.name in _ORDER and repeat == 1:
        new_axis = _reordered(call, len(value.shape), axis)
    elif call.name in _VIEW:
        return _viewed(call, value, out, axis, repeat, channels)
    elif repeat == 1 and _averages(call, value, axis):
        new_axis = axis if len(out.shape) == len(value.shape) else None
    elif repeat == 1 and call.name == "mean":
        new_axis = _mean_axis(call, len(value.shape), axis)
    return None if new_axis is None else (out, new_axis, repeat)


def _reordered(call: Call, dims: int, axis: int) -> int | None:
    """Try the same call on an empty tensor whose sizes are all different, and look where the axis went."""
    if call.function is None:
        return None
    sizes = [i + 2 for i in range(dims)]
    moved = call.function(torch.empty(sizes, device="meta"), *call.args[1:], **call.kwargs)
    return list(moved.shape).index(axis + 2)


def _viewed(
    call: Call, value: Value, out: Value, axis: int, repeat: int, channels: int
) -> tuple[Value, int, int] | None:
    """Find the dimension that starts where the channels started, if it holds whole channels."""
    if call.name == "__getitem__" and prod(out.shape) != prod(value.shape):
        return None
    before = prod(value.shape[:axis])
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
    if call.name in _ADAPTIVE:
        return axis == dims - 1 - _ADAPTIVE[call.name]
    if call.name in _MEAN_POOL:
        padding = call.kwargs.get("padding", call.args[3] if len(call.args) > 3 else 0)
        ceil = call.kwargs.get("ceil_mode", call.args[4] if len(call.args) > 4 else False)
        divisor = call.kwargs.get("divisor_override", call.args[6] if len(call.args) > 6 else None)
        padded = any(padding) if isinstance(padding, tuple) else bool(padding)
        return axis == dims - 1 - _MEAN_POOL[call.name] and not padded and not ceil and divisor is None
    if call.name == "pad":
        pad = call.kwargs.get("pad", call.args[1] if len(call.args) > 1 else ())
        mode = call.kwargs.get("mode", call.args[2] if len(call.args) > 2 else "constant")
        return mode in ("reflect", "replicate", "circular") and axis < dims - len(pad) // 2
    return call.name == "interpolate" and axis == 1


def _mean_axis(call: Call, dims: int, axis: int) -> int | None:
    over = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else None)
    if over is None or "dtype" in call.kwargs:
        return None
    gone = {d % dims for d in (over if isinstance(over, tuple) else (over,))}
    if axis in gone:
        return None
    keep = call.kwargs.get("keepdim", call.args[2] if len(call.args) > 2 else False)
    return axis if keep else axis - sum(d < axis for d in gone)
