"""Padded batches: a training step of one batch norm with a mask beside the step without.

Forward and backward with ReLU. Three masks: nothing is padding; sequences of half to whole length, or images
of half to whole height; one value in ten left out by chance. Results are compared with the values alone
first. A mask is the same at each call, as for the layers of a network. Where others use the machine,
``OMP_WAIT_POLICY=PASSIVE`` and ``--cpu-time`` give the time of all threads together.
"""

import argparse
import time
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor

from gammabeta.functional import batch_norm

from ..harness import IncorrectError, Options, Result
from ..harness.timing import interleave

SHAPES = ((32, 64, 250), (32, 128, 500), (32, 256, 1000), (16, 512, 1600), (16, 64, 56, 56))
MASKS = ("nothing", "half to whole", "one in ten")
ROUNDS = 41
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the suite's options."""
    parser.add_argument("--cpu-time", action="store_true", help="time of all threads together")
    parser.add_argument("--fresh", action="store_true", help="another mask tensor at each call")


def mask_of(shape: tuple[int, ...], kind: str) -> Tensor:
    """A mask (N, *spatial), True where there is a value."""
    where = (shape[0], *shape[2:])
    if kind == "nothing":
        return torch.ones(where, dtype=torch.bool)
    if kind == "one in ten":
        return torch.rand(where) > 0.1
    longest = shape[2]
    lengths = torch.randint(longest // 2, longest + 1, (shape[0],))
    kept = torch.arange(longest) < lengths[:, None]
    return kept.view(*kept.shape, *[1] * (len(shape) - 3)).expand(where).contiguous()


def case(shape: tuple[int, ...], kind: str, layout: str, given: argparse.Namespace) -> dict[str, Any]:
    """Share of what is kept, and milliseconds of a step without and with the mask."""
    x = torch.randn(shape)
    if layout == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    mask, grad = mask_of(shape, kind), torch.randn_like(x)
    x.requires_grad_()
    weight, bias = torch.rand(shape[1], requires_grad=True), torch.rand(shape[1], requires_grad=True)
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])

    def step(where: Tensor | None, x: Tensor = x, grad: Tensor = grad) -> tuple[Tensor, ...]:
        out = batch_norm(x, mean, var, weight, bias, True, activation="relu", mask=where)
        return out, *torch.autograd.grad(out, (x, weight, bias), grad)

    def alone(t: Tensor) -> Tensor:
        return t.detach().movedim(1, -1)[mask]

    name = f"{'×'.join(map(str, shape))} {layout}, padding: {kind}"
    expected = step(None, alone(x).requires_grad_(), alone(grad))
    for one, other in zip(step(mask), expected, strict=True):
        if not torch.allclose(alone(one) if one.dim() > 1 else one, other, **CLOSE):
            raise IncorrectError(f"{name}: not what the values alone give")
    programs = {"plain": lambda: step(None), "masked": lambda: step(mask.clone() if given.fresh else mask)}
    clock = time.process_time if given.cpu_time else time.perf_counter
    times = interleave(programs, rounds=ROUNDS, clock=clock)
    plain, masked = (times[which].median * 1e3 for which in programs)
    return {
        "case": name, "kept": float(mask.float().mean()), "ms without a mask": plain, "ms with": masked,
        "times as fast": plain / masked,
    }  # fmt: skip


def run(options: Options) -> Result:
    """Each shape in both layouts with each mask."""
    torch.manual_seed(0)
    shapes, kinds = (SHAPES[:1], MASKS[2:]) if options.quick else (SHAPES, MASKS)
    layouts = ("contiguous", "channels_last")
    rows = [
        case(shape, kind, layout, options.given) for shape in shapes for layout in layouts for kind in kinds
    ]
    ratios = [row["times as fast"] for row in rows]
    summary = {"slowest": min(ratios), "geometric mean": geometric_mean(ratios)}
    notes = ["Processor time of all threads."] if options.given.cpu_time else []
    return Result("Batch norm with a mask", rows, summary, notes)
