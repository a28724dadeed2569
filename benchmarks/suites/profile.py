"""Suite ``profile``: where each millisecond of a training step goes, float32 beside bf16.

The digit network with one of our recipes on MNIST, as ``gammabeta train`` runs it. Steps are timed without
the profiler first; ``torch.profiler`` then says how a step divides. An operator's own time counts for the
nearest operator around it that belongs to a part, so that a copy within a convolution is convolution. What
no operator accounts for is Python, and threads waiting for each other.
"""

import argparse
import os
import time
from collections import Counter
from collections.abc import Iterable
from statistics import median
from typing import TYPE_CHECKING, Any

from ..harness import Options, Result

if TYPE_CHECKING:
    from gammabeta.train.loop import Training

#: Parts of a step, and how the names of their operators begin.
PARTS = {
    "first convolution and batch norm in one, backward": ("_StemBackward",),
    "first convolution and batch norm in one, forward": ("_Stem",),
    "convolutions, backward": ("aten::convolution_backward", "ConvolutionBackward", "_ConvolveBackward"),
    "convolutions, forward": ("aten::conv2d", "_Convolve"),
    "batch norm + ReLU + pooling, backward": ("_TrainBackward", "NativeBatchNormBackward", "ReluBackward"),
    "batch norm + ReLU + pooling, forward": ("_Train", "aten::batch_norm", "aten::relu"),
    "linear layers": ("aten::linear", "AddmmBackward"),
    "optimiser": ("aten::_fused_sgd_", "Optimizer."),
    "loss": ("aten::cross_entropy_loss", "LogSoftmaxBackward", "NllLossBackward"),
    "casts to and from bf16": ("aten::to", "ToCopyBackward"),
}
OTHER, PYTHON = "other operators: the batch, sums of gradients", "Python, and waiting"
WHOLE, UNPROFILED, FIRST = "a step, profiled", "a step, not profiled", "the first step"
_PREFIX = "autograd::engine::evaluate_function: "


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the suite's options."""
    parser.add_argument("--recipe", default="classic", metavar="NAME", help="%(default)s")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="to average over; %(default)s")


def run(options: Options) -> Result:
    """Profile the steps of a recipe in float32 and bf16."""
    steps = 3 if options.quick else options.given.steps
    columns = {precision: profile(options.given.recipe, precision, steps) for precision in ("fp32", "bf16")}
    rows = [
        {"case": part, **{f"{name}, ms": f"{times[part]:.2f}" for name, times in columns.items()}}
        for part in columns["fp32"]
    ]
    note = (
        f"Recipe {options.given.recipe}, {steps} steps, milliseconds a step. The profiler itself lengthens a "
        "step; without it the median is given. The first step also loads kernels and touches memory first."
    )
    summary = {
        f"{UNPROFILED}, {name}": f"{times[UNPROFILED]:.2f} ms, {PYTHON}: {times[PYTHON]:.2f} ms"
        for name, times in columns.items()
    }
    return Result("Where a training step's time goes", rows, summary, [note])


def profile(recipe_name: str, precision: Any, steps: int) -> dict[str, float]:
    """Return the milliseconds a step of every part, and of whole steps."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would tell of its own start and stop
    import torch

    from gammabeta.kernels.cpu.allocator import keep_pages
    from gammabeta.train.fitting import quick

    training = _training(recipe_name, precision)
    with keep_pages(), quick(training.model):
        first = _seconds(training, 1)
        _seconds(training, 10)
        unprofiled = median(_seconds(training, 1) for _ in range(steps))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            profiled = _seconds(training, steps) / steps
    own = own_times((event.name, event.self_cpu_time_total, _around(event)) for event in profiler.events())
    parts = {part: own[part] / 1e3 / steps for part in (*PARTS, OTHER)}
    parts[PYTHON] = 1e3 * profiled - sum(parts.values())
    return parts | {WHOLE: 1e3 * profiled, UNPROFILED: 1e3 * unprofiled, FIRST: 1e3 * first}


def own_times(events: Iterable[tuple[str, float, Iterable[str]]]) -> Counter[str]:
    """Add up times by part; an event is its name, its own time and the names around it, nearest first."""
    found: Counter[str] = Counter()
    for name, own, around in events:
        parts = (part_of(outer) for outer in (name, *around))
        found[next((part for part in parts if part), OTHER)] += own  # type: ignore[assignment]
    return found


def part_of(name: str) -> str | None:
    """The part that an operator of this name belongs to."""
    name = name.removeprefix(_PREFIX)
    return next((part for part, starts in PARTS.items() if name.startswith(starts)), None)


def _around(event: Any) -> list[str]:
    names = []
    while (event := event.cpu_parent) is not None:
        names.append(event.name)
    return names


def _seconds(training: "Training", steps: int) -> float:
    began = time.perf_counter()
    training.advance(steps)
    return time.perf_counter() - began


def _training(recipe_name: str, precision: Any) -> "Training":
    import torch

    from gammabeta.conversion.convert import convert
    from gammabeta.data import load
    from gammabeta.train import build_network, load_recipe
    from gammabeta.train.batches import DeviceImages, Scaling
    from gammabeta.train.loop import Training
    from gammabeta.train.world import place_model

    recipe, dataset, place = load_recipe(recipe_name), load("mnist"), torch.device("cpu")
    model = place_model(convert(build_network(recipe, dataset, 0), to="fused"), place)
    scaling = Scaling.of(dataset.train.images, recipe.pixels)
    images = DeviceImages(dataset.train, scaling, place, shift=recipe.shift, flip=recipe.flip)
    return Training(model, images, recipe, 0, precision)
