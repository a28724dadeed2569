"""The learning-rate range test: a short training whose rate grows step by step (Smith 2017, 3.3)."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from ..conversion.convert import convert
from ..data import Dataset
from ..errors import UsageError
from .batches import DeviceImages, Scaling
from .fitting import quick
from .loop import Training
from .recipe import Recipe
from .world import place_model, resolve_device, resolve_precision

LOWEST, HIGHEST = 1e-6, 10.0  # of the mean loss over a batch; of its sum, divided by the batch
_SMOOTHING = 0.15  # weight of the newest loss in the curve
_OVER = 3.0  # times the lowest loss: from there on nothing is learned
_FALLEN = 0.1  # of the whole fall of the loss, where the range begins
# The deviation of a smoothed curve from its median second difference: these are √2 times the steps, whose
# deviation is _SMOOTHING σ for losses of deviation σ; the curve's own is σ √(_SMOOTHING / (2 − _SMOOTHING)).
_NOISE = 1.48 / 2**0.5 / (_SMOOTHING * (2 - _SMOOTHING)) ** 0.5


@dataclass(frozen=True)
class RateRange:
    """What a range test found.

    Attributes:
        rates: The learning rate of each step that was taken.
        losses: The cross-entropy in nats after each, smoothed and debiased.
        low: Where the loss has begun to fall for good; the first quarter of the rates is too low for that.
        high: Where it has all but reached its lowest: higher rates gain nothing, and at some the training
            diverges.
        suggested: A highest rate for a schedule: ``high``, at most a third of the rate with the lowest loss,
            and at least where the fall is steepest.
    """

    rates: list[float]
    losses: list[float]
    low: float
    high: float
    suggested: float


def find_rate(
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    *,
    device: str = "auto",
    seed: int = 0,
    steps: int = 100,
) -> RateRange:
    """Train a network for a few steps at growing learning rates; its weights are spoilt by that.

    Args:
        model: Any network from ``(N, C, H, W)`` float32 to logits ``(N, classes)``.
        dataset: Of which the training images are used.
        recipe: Everything but the learning rate: batch size, optimizer, augmentation.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        seed: Of the order and the augmentation of the images.
        steps: How many rates are tried, at least 20.

    Raises:
        UsageError: There are too few steps, or the loss falls at no rate.
    """
    if steps < 20:
        raise UsageError(f"{steps} steps say nothing: at least 20 are needed")
    place = resolve_device(device)
    images = DeviceImages.to_train_on(
        dataset.train, Scaling.of(dataset.train.images, recipe.pixels), place, recipe
    )
    model = place_model(convert(model, to="fused"), place)
    training = Training(model, images, recipe, seed, resolve_precision(recipe.precision, place))
    training.steps = steps
    unit = recipe.batch_size if recipe.loss == "sum" else 1
    growth = (HIGHEST / LOWEST) ** (1 / (steps - 1))
    training.rate = lambda step: LOWEST / unit * growth**step
    rates, losses, average = [], [], 0.0
    with quick(model):
        for step in range(steps):
            rates.append(training.rate(step))
            training.advance(1)
            training.progress()
            average += _SMOOTHING * (training.newest_loss - average)
            losses.append(average / (1 - (1 - _SMOOTHING) ** (step + 1)))
            if not math.isfinite(average) or losses[-1] > _OVER * min(losses):
                break
    return _read(rates, losses)


def _read(rates: list[float], losses: list[float]) -> RateRange:
    """The range that a curve shows."""
    if not math.isfinite(losses[-1]):
        rates, losses = rates[:-1], losses[:-1]
    curve = torch.tensor(losses)
    start, bottom = float(curve[: max(1, len(losses) // 4)].median()), float(curve.min())
    fall = start - bottom
    if len(losses) < 4 or fall < 0.02 * start:
        raise UsageError("the loss falls at no learning rate: is there anything to learn in these images?")
    # On a long flat bottom the lowest place is chance: the range ends where the bottom is reached.
    noise = _NOISE * float(curve.diff(n=2).abs().median())
    lowest = int(curve.argmin())
    end = int((curve <= bottom + 2 * noise).nonzero()[0])
    before = (curve[: end + 1] > start - _FALLEN * fall).nonzero()
    begun = min(int(before[-1]) + 1, end) if len(before) else 0
    steepest = begun + int(curve[begun : end + 1].diff().argmin()) if end > begun else begun
    suggested = max(min(rates[end], rates[lowest] / 3), rates[steepest])
    return RateRange(rates, losses, rates[begun], rates[end], suggested)
