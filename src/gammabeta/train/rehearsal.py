"""Have the kernels that a training needs compiled before it begins, so that no step waits for one."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch.nn import functional as F

from ..kernels.cpu.compiler import rehearsal
from ..kernels.cpu.registry import Key
from ..kernels.cpu.workers import compile_all
from ..stats.preserve import preserved
from ..stats.recalibrate import recalibrate
from .batches import DeviceImages
from .evaluate import evaluating, evaluation_batch
from .loop import Training


def compile_kernels(training: Training, judged: DeviceImages, told: Callable[[int, int], None]) -> float:
    """Find out which kernels are missing, and compile them all at once; return the seconds it took.

    A step and an evaluation are rehearsed: they run up to the first kernel that is missing, and from there on
    without any. The model is left as it was. What a rehearsal overlooks is compiled where it is first used,
    as for several ranks, which would have to rehearse together.
    """
    if judged.labels.device.type != "cpu" or training.world.size > 1:
        return 0.0
    clock = time.perf_counter()
    missing: dict[Key, None] = {}
    for part in _parts(training, judged):
        # What comes out may be anything, and a model may refuse that; a step will tell what is wrong.
        with suppress(Exception), rehearsal() as found:
            try:
                with preserved(training.model), _autocast(training):
                    part()
            finally:
                missing |= found
    compile_all(missing, told)
    return time.perf_counter() - clock


def _autocast(training: Training) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=training.precision == "bf16")


def _parts(training: Training, judged: DeviceImages) -> Iterator[Callable[[], object]]:
    """What a training computes with the model."""
    model, recipe = training.model, training.recipe
    x, y = training.data.batch(training.order.indices(0))

    def step() -> None:
        model.train()
        F.cross_entropy(model(x).float(), y).backward()

    def evaluation() -> None:
        with evaluating(model), torch.autocast("cpu", enabled=False):
            model(judged.batch(slice(0, evaluation_batch(*judged.size)))[0])

    yield step
    yield evaluation
    if recipe.recalibrate and recipe.batch_norm:
        yield lambda: recalibrate(model, [x])
