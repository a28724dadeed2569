"""Random calls of ``batch_norm`` beside torch's, against the float64 truth; see ``test_beside_torch.py``.

A case is drawn from its seed alone: shape, layout, strides, dtypes, values, epilogue, threads. Where rounding
decides which branch of an activation, or which element of a window, is taken, the upstream gradient is zero:
float64 and float32 may rightly differ there.
"""

import math
import random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gammabeta.epilogue import NOTHING, Epilogue, MaxPool
from gammabeta.kernels.backend import Call
from tests import oracle

KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "leaky_relu": (0.0,), "hardswish": (-3.0, 3.0)}
#: Epilogues of the quick run: few, because each is several kernels to compile.
QUICK = (
    NOTHING, Epilogue("relu"), Epilogue("relu6"), Epilogue("silu"), Epilogue("gelu"), Epilogue("relu", 2),
    Epilogue(None, 2), Epilogue("relu", MaxPool(3, 2, 1)), Epilogue(None, MaxPool(2, 2)),
)  # fmt: skip
ALL = (*QUICK, Epilogue("leaky_relu"), Epilogue("hardswish"), Epilogue("silu", 2))


class Case(NamedTuple):
    """A call, what flows back, and the running statistics before it."""

    call: Call
    grad: Tensor
    running: tuple[Tensor, Tensor]
    momentum: float
    training: bool
    threads: int
    values: str


# --- values -----------------------------------------------------------------------------------------------


def _outliers(x: Tensor, draw: random.Random) -> Tensor:
    return torch.where(torch.rand_like(x) < draw.choice((1e-3, 1e-2, 0.1)), x * 10 ** draw.uniform(1, 4), x)


def _one_outlier(x: Tensor, draw: random.Random) -> Tensor:
    x = torch.full_like(x, draw.choice((0.0, 0.1, -3.0)))
    x.view(-1)[draw.randrange(x.numel())] = draw.uniform(10, 1e4)
    return x


def _levels(x: Tensor, draw: random.Random) -> Tensor:
    """Every image has a level of its own."""
    return x * draw.choice((0.0, 1e-3, 1.0)) + torch.randn(x.shape[0], *[1] * (x.dim() - 1)) * 10


VALUES: dict[str, Any] = {
    "normal": lambda x, draw: x,
    "outliers": _outliers,
    "one outlier": _one_outlier,
    "levels": _levels,
    "large mean": lambda x, draw: x * 10 ** draw.uniform(-1, 1) + 10 ** draw.uniform(1, 3),
    "constant": lambda x, draw: torch.full_like(x, draw.uniform(-100, 100)),
    "denormal": lambda x, draw: x * 1e-40,
    "tiny": lambda x, draw: x * 1e-6,
    "huge": lambda x, draw: x * 10 ** draw.uniform(4, 12),
    "after relu": lambda x, draw: x.relu() * 3,
    "whole numbers": lambda x, draw: (x * 3).round(),
}


# --- layouts ----------------------------------------------------------------------------------------------


def laid_out(t: Tensor, draw: random.Random) -> Tensor:
    """The same values, somewhere else in memory, behind guards that hold a NaN each."""
    kind = draw.choice(("contiguous", "channels_last", "channels_last", "sliced", "transposed"))
    if kind == "channels_last" and t.dim() > 2:
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if kind == "sliced":
        wide = t.new_full((*t.shape[:-1], t.shape[-1] * 2 + 1), math.nan)
        wide[..., 1::2] = t
        return wide[..., 1::2]
    if kind == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    flat = t.new_full((t.numel() + 32,), math.nan)
    flat[16:-16] = t.reshape(-1)
    return flat[16:-16].view(t.shape)


def shape_of(draw: random.Random, epilogue: Epilogue) -> tuple[int, ...]:
    """(N, C, *spatial), mostly some thousand elements, with a plane that the pool fits in."""
    dims = 4 if epilogue.pool else draw.choice((2, 3, 4, 4, 4, 5))
    most = draw.choice((300, 3000, 3000, 20000))
    shape = [draw.choice((1, 2, 3, 8, draw.randint(1, 40))), draw.choice((1, 3, 16, draw.randint(1, 70)))]
    shape += [draw.randint(3 if epilogue.pool else 1, 24) for _ in range(dims - 2)]
    while math.prod(shape) > most and max(shape) > 3:
        side = shape.index(max(shape))
        shape[side] = max(3, shape[side] // 2)
    if math.prod(shape) == shape[1]:
        shape[0] = 2
    return tuple(shape)


# --- a case -----------------------------------------------------------------------------------------------


def case_of(seed: int, epilogues: tuple[Epilogue, ...] = QUICK) -> Case:
    """The case of a seed."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    epilogue = draw.choice(epilogues)
    shape, values = shape_of(draw, epilogue), draw.choice(list(VALUES))
    dtype = draw.choice((torch.float32, torch.float32, torch.bfloat16))
    x = VALUES[values](torch.randn(shape), draw).to(dtype)
    x = x[:1].expand(shape) if draw.random() < 0.05 and shape[0] > 1 and x[0, 0].numel() > 1 else x
    if draw.random() < 0.9:
        x = laid_out(x, draw)
    residual = laid_out(torch.randn(shape).to(dtype), draw) if draw.random() < 0.3 else None
    channels = shape[1]
    weight = (torch.rand(2 * channels) + 0.5)[:: draw.choice((1, 2))][:channels]
    bias: Tensor | None = torch.randn(channels)
    if draw.random() < 0.2:
        weight = bias = None  # type: ignore[assignment]
    call = Call(x, weight, bias, residual, epilogue, draw.choice((1e-5, 1e-3, 1e-8)))
    running = torch.randn(channels), torch.rand(channels) + 0.1
    training = draw.random() < 0.8
    grad = certain(call, None if training else running)
    grad = laid_out(grad.to(dtype), draw)
    return Case(call, grad, running, draw.choice((0.1, 0.01, 1.0)), training, draw.randint(1, 4), values)


def certain(call: Call, given: oracle.Statistics | None) -> Tensor:
    """A random upstream gradient, zero where a rounding may decide about the derivative."""
    half = call.x.dtype is torch.bfloat16
    call = oracle.exact(call)
    if given is not None:
        given = given[0].double(), given[1].double()
    z = oracle.batch_norm(call._replace(epilogue=NOTHING), given)
    mean, var = given or oracle.statistics(call.x)
    reach = (mean.abs() / (var + call.eps).sqrt()).view(-1, *[1] * (z.dim() - 2))
    near = (2.0**-6 if half else 2.0**-12) * (1 + z.abs() + 4 * reach.clamp(max=1e3))
    doubtful = torch.zeros_like(z)
    for kink in KINKS.get(call.epilogue.activation or "", ()):
        doubtful = torch.maximum(doubtful, ((z - kink).abs() < near).double())
    pool = call.epilogue.pool
    if isinstance(pool, MaxPool):
        y = Epilogue(call.epilogue.activation).apply(z)
        best, allowed = F.max_pool2d(y, *pool), F.max_pool2d(near, *pool)
        doubtful = torch.maximum(F.max_pool2d(doubtful, *pool), _ties(y, best, pool, allowed))
    elif pool:
        doubtful = F.max_pool2d(doubtful, 2)
    return torch.randn(doubtful.shape) * (doubtful == 0)


def _ties(y: Tensor, best: Tensor, pool: MaxPool, allowed: Tensor) -> Tensor:
    """Windows whose two greatest elements are nearer than ``allowed``."""
    kernel, stride, padding = pool
    padded = F.pad(y, (padding,) * 4, value=-math.inf)
    windows = padded.unfold(2, kernel, stride).unfold(3, kernel, stride).flatten(-2)
    close = (windows > (best - allowed).unsqueeze(-1)).sum(-1)
    return (close > 1).double()
