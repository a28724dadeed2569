"""Batch normalization layer by layer: ours against torch's own operators, on the shapes real networks have.

Each case times one training step of a layer (forward, then backward with a random upstream gradient) through
``gammabeta.functional.batch_norm``, with all allocation, against the same in torch's operators; or the
forward in evaluation. The torch version adds and activates in place, as torch's own models do; a second one
makes new tensors, as ``nn.ReLU()`` and ``+`` do by default. A copy of as much memory as the tensors of the
case have, timed right after, says how fast memory was just then, and so what it allows at best.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gammabeta import functional
from gammabeta.epilogue import NOTHING, MaxPool, Pool, pooled_shape
from gammabeta.functional import learned
from gammabeta.kernels.backend import Call, Running

from ..harness import IncorrectError, Options, Result
from ..harness.timing import Timing, interleave

# (N, C, H, W): stages of the networks named; (N, C) for perceptrons
SHAPES = {
    "ResNet-18 stem": (8, 64, 112, 112),
    "ResNet-18 stage 1": (16, 64, 56, 56),
    "ResNet-18 stage 2": (16, 128, 28, 28),
    "ResNet-18 stage 3": (16, 256, 14, 14),
    "ResNet-18 stage 4": (16, 512, 7, 7),
    "ResNet-50 stage 1": (8, 256, 56, 56),
    "ResNet-50 stage 2": (32, 512, 28, 28),
    "ResNet-50 stage 3": (32, 1024, 14, 14),
    "ResNet-50 stage 4": (64, 2048, 7, 7),
    "MobileNetV2 block 1": (16, 96, 56, 56),
    "MobileNetV2 block 3": (16, 144, 28, 28),
    "MobileNetV2 block 10": (32, 384, 14, 14),
    "MobileNetV2 head": (32, 1280, 7, 7),
    "DenseNet-121 block 1": (8, 128, 56, 56),
    "DenseNet-121 block 3": (16, 1000, 14, 14),
    "digits 1": (64, 20, 26, 26),
    "digits 2": (64, 50, 9, 9),
    "perceptron 64×128": (64, 128),
    "perceptron 128×512": (128, 512),
    "perceptron 1024×1024": (1024, 1024),
}
_POOLED = ("ResNet-18 stage 1", "ResNet-50 stage 2", "DenseNet-121 block 1", "digits 1", "digits 2")
_MAX_POOLED = ("ResNet-18 stem", "ResNet-18 stage 2", "DenseNet-121 block 1")
_QUICK = ("ResNet-18 stage 1", "digits 1", "perceptron 64×128")
_CACHE_BYTES = 32 << 20  # of the last cache
_FIXED_COST_BYTES = 64 << 10  # up to which the memory moved says nothing


@dataclass(frozen=True)
class Case:
    """One layer: what it does, on which shape."""

    operation: str
    name: str
    shape: tuple[int, ...]
    channels_last: bool
    activation: str | None = None
    residual: bool = False
    pool: Pool = None
    dtype: torch.dtype = torch.float32
    training: bool = True

    @property
    def title(self) -> str:
        """For people."""
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"{self.operation} · {self.name} {'×'.join(map(str, self.shape))} · {layout}"

    @property
    def nbytes(self) -> int:
        """Of the input."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def tensors(self) -> int:
        """The large tensors of a step: input and output, and in training the gradients of both."""
        return (4 if self.training else 2) + 2 * self.residual


def cases(quick: bool) -> list[Case]:
    """Every layer that is measured."""
    found = []
    operations: list[tuple[str, dict[str, object], tuple[str, ...]]] = [
        ("BN", {}, tuple(SHAPES)),
        ("BN+ReLU", {"activation": "relu"}, tuple(SHAPES)),
        ("BN+ReLU+pool", {"activation": "relu", "pool": 2}, _POOLED),
        ("BN+ReLU+max pool", {"activation": "relu", "pool": MaxPool(3, 2, 1)}, _MAX_POOLED),
        ("BN+add+ReLU", {"activation": "relu", "residual": True}, tuple(SHAPES)),
        ("BN+ReLU bf16", {"activation": "relu", "dtype": torch.bfloat16}, tuple(SHAPES)),
        ("BN+PReLU", {"activation": "prelu"}, _POOLED),
        ("BN+ReLU evaluation", {"activation": "relu", "training": False}, tuple(SHAPES)),
    ]
    for operation, options, names in operations:
        for name in names:
            if quick and name not in _QUICK:
                continue
            shape = SHAPES[name]
            layouts = (False, True) if len(shape) == 4 else (False,)
            found += [Case(operation, name, shape, layout, **options) for layout in layouts]  # type: ignore[arg-type]
    return found


class Layer:
    """A case with its tensors, as the two programs that are compared."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        channels = case.shape[1]
        form = torch.channels_last if case.channels_last else torch.contiguous_format
        self.case = case
        self.x = (torch.randn(case.shape) + 0.5).to(case.dtype, memory_format=form).requires_grad_()
        self.residual = None
        if case.residual:
            self.residual = torch.randn(case.shape).to(case.dtype, memory_format=form).requires_grad_()
        self.weight = (torch.rand(channels) + 0.5).requires_grad_()
        self.bias = torch.randn(channels).requires_grad_()
        self.slope = torch.full((channels,), 0.25).requires_grad_() if case.activation == "prelu" else None
        self.mean, self.var = torch.zeros(channels), torch.ones(channels)
        with torch.no_grad():
            out = self._torch()
        self.grad = torch.randn(out.shape).to(case.dtype, memory_format=form)

    def _torch(self, inplace: bool = True) -> Tensor:
        case = self.case
        y = F.batch_norm(self.x, self.mean, self.var, self.weight, self.bias, case.training)
        if self.residual is not None:
            y = y.add_(self.residual) if inplace else y + self.residual
        if self.slope is not None:
            y = F.prelu(y, self.slope)
        elif case.activation:
            y = F.relu(y, inplace=inplace)
        if isinstance(case.pool, MaxPool):
            return F.max_pool2d(y, *case.pool)
        return F.avg_pool2d(y, case.pool) if case.pool else y

    def _ours(self) -> Tensor:
        case = self.case
        if self.slope is not None:
            call = Call(self.x, self.weight, self.bias, None, NOTHING, 1e-5)
            return learned.train(call, Running(self.mean, self.var, 0.1), self.slope)[0]
        return functional.batch_norm(
            self.x,
            self.mean,
            self.var,
            self.weight,
            self.bias,
            case.training,
            activation=case.activation,
            residual=self.residual,
            pool=case.pool,
        )

    def _step(self, layer: Callable[[], Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = [t for t in (self.x, self.weight, self.bias, self.residual, self.slope) if t is not None]
        if not self.case.training:
            with torch.inference_mode():
                return layer(), ()
        out = layer()
        return out, torch.autograd.grad(out, leaves, self.grad)

    def torch_step(self) -> object:
        """One step in torch's operators."""
        return self._step(self._torch)

    def apart_step(self) -> object:
        """The same, with new tensors for sum and activation."""
        return self._step(lambda: self._torch(inplace=False))

    def our_step(self) -> object:
        """One step in ours."""
        return self._step(self._ours)

    def copy(self) -> Callable[[], object]:
        """A copy from one half to the other of as much memory as the tensors of a step have."""
        size = self.case.nbytes * self.case.tensors // 8
        source, target = torch.ones(size), torch.ones(size)
        return lambda: target.copy_(source)

    def check(self) -> None:
        """Raise ``IncorrectError`` unless both programs agree.

        The error is taken over a whole tensor: a value a rounding away from ReLU's kink may fall on either
        side of it, which changes its gradient from all to nothing.
        """
        bound = 3e-2 if self.case.dtype is torch.bfloat16 else 3e-3 if self.case.activation else 1e-5
        theirs, ours = self._step(self._torch), self._step(self._ours)
        for a, b in zip((theirs[0], *theirs[1]), (ours[0], *ours[1]), strict=True):
            off = ((a.float() - b.float()).norm() / a.float().norm()).item()
            if not off <= bound:
                raise IncorrectError(f"{self.case.title}: off by {off:.2g} of its norm")


def least_bytes(case: Case) -> float:
    """The fewest bytes a step can move: contiguous, a channel's values are read from memory once.

    Reads are those of the input (in training a second time where a channel's values lie too far apart to
    stay in a cache: statistics come first), the gradient likewise, the residual, which is read again for
    the activation's derivative; writes are output, gradient and the residual's gradient.
    """
    out = math.prod(pooled_shape(case.shape, case.pool)) / math.prod(case.shape)
    twice = 2 if case.channels_last else 1
    if not case.training:
        passes = 1 + out + case.residual
    elif case.residual:
        # dz is written for the residual, and is what the second pass reads
        passes = twice + out + 1 + (1 + out + 1 + 1) + (2 if case.channels_last else 0) + 1
    else:
        passes = twice + out + twice * (1 + out) + 1
    return passes * case.nbytes


def _row(case: Case, found: dict[str, Timing]) -> dict[str, object]:
    ours, theirs = found["ours"].median, found["torch"].median
    bandwidth = case.tensors * case.nbytes / found["copy"].median
    least = least_bytes(case) / bandwidth
    beyond = case.nbytes > _CACHE_BYTES and case.pool is None
    return {
        "case": case.title,
        "operation": case.operation,
        "KiB": case.nbytes // 1024,
        "torch ms": theirs * 1e3,
        "ours ms": ours * 1e3,
        "times faster": theirs / ours,
        "spread": (found["ours"].upper - found["ours"].lower) / ours,
        "than not in place": found["apart"].median / ours if "apart" in found else None,
        "memory allows": theirs / least if case.nbytes > _FIXED_COST_BYTES else None,
        "copy GB/s": bandwidth / 1e9,
        "of copy": least / ours if beyond else None,
    }


def _summary(rows: list[dict[str, Any]]) -> dict[str, object]:
    summary: dict[str, object] = {}
    for operation in dict.fromkeys(str(row["operation"]) for row in rows):
        mine = [row for row in rows if row["operation"] == operation]

        def mean(column: str, mine: list[dict[str, Any]] = mine) -> float:
            return geometric_mean([row[column] for row in mine if row[column] is not None])

        least = min(row["times faster"] for row in mine)
        text = f"geometric mean {mean('times faster'):.2f}×, least {least:.2f}×, {len(mine)} cases"
        text += f"; memory allows {mean('memory allows'):.2f}×"
        if mine[0]["than not in place"] is not None:
            text += f"; than torch not in place {mean('than not in place'):.2f}×"
        summary[operation] = text
    slow = [row for row in rows if row["KiB"] > 64 and row["times faster"] < 1.5]
    large = [row for row in rows if row["KiB"] > 64]
    summary["above 64 KiB"] = f"{len(slow)} of {len(large)} cases under 1.5×"
    summary["all"] = f"{sum(row['times faster'] < 0.95 for row in rows)} of {len(rows)} cases under 0.95×"
    shares = [row["of copy"] for row in rows if row["of copy"] is not None]
    if shares:
        summary["beyond the last cache"] = (
            f"{100 * geometric_mean(shares):.0f} % of the copy bandwidth (least {100 * min(shares):.0f} %)"
        )
    return summary


def run(options: Options) -> Result:
    """Check every case, then time it."""
    rows: list[dict[str, Any]] = []
    for case in cases(options.quick):
        layer = Layer(case)
        layer.check()
        rounds = 5 if options.quick else 11
        found = interleave({"torch": layer.torch_step, "ours": layer.our_step}, rounds=rounds)
        # By themselves: what they leave in the caches is of no use to the two.
        beside = {"copy": layer.copy()}
        if case.training and (case.activation or case.residual):
            beside["apart"] = layer.apart_step
        rows.append(_row(case, found | interleave(beside, rounds=rounds)))
    notes = [
        "Forward and backward with allocation, medians of interleaved rounds; torch's ReLU and addition in "
        "place. `than not in place`: how many times faster than torch with new tensors for both. `memory "
        "allows`: the same, were ours to move the fewest bytes the layout allows as fast as a copy of as "
        "much memory right after, `copy GB/s`. `of copy`: the share of that speed ours has. `spread` "
        "is the quartile distance."
    ]
    return Result("Batch normalization layer by layer, CPU", rows, _summary(rows), notes, chart=None)
