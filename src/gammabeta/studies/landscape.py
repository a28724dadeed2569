"""Santurkar et al. 2018, figures 2 and 4: a smoother landscape, and not a smaller covariate shift."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import gammabeta.nn as ours

from .networks import Norm, convolutions
from .pictures import line
from .study import Criterion, Measured, Results, Study
from .trial import Images, Sgd, Trial, layers, parameters


@dataclass(frozen=True)
class Setting:
    """The landscape is looked at ``every`` so many steps, ``along`` the gradient at multiples of the rate."""

    train: int = 8000
    channels: tuple[int, ...] = (16, 16, 32, 32, 32, 32)
    batch: int = 128
    steps: int = 300
    every: int = 10
    rate: float = 0.1
    target: float = 0.5
    along: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)


QUICK = Setting(train=300, channels=(4, 4, 8, 8), batch=32, steps=12, every=6, target=10.0)


class Noise(nn.Module):
    """The paper's noise: another mean and deviation of each channel at each step, a draw for each value."""

    def forward(self, x: Tensor) -> Tensor:
        """Return s x + m in training."""
        if not self.training:
            return x
        shape = (1, x.shape[1], 1, 1)
        mean, deviation = torch.rand(shape) - 0.5, 1 + 0.25 * torch.rand(shape)
        return x * (deviation + 0.1 * torch.randn_like(x)) + mean + 0.2 * torch.rand_like(x) - 0.1


def noisy(width: int) -> nn.Module:
    """Batch norm, then noise."""
    return nn.Sequential(ours.BatchNorm2d(width), Noise())


_KINDS: dict[str, Norm | None] = {"with": ours.BatchNorm2d, "without": None, "noisy": noisy}


class Landscape:
    """Loss and gradient along a step, at points of a training; and how much a layer's input moves."""

    def __init__(self, s: Setting, model: nn.Module, images: Images) -> None:
        self.s, self.model, self.batch = s, model, (images.x[: s.batch], images.y[: s.batch])
        self.ranges: list[float] = []
        self.changes: list[float] = []
        self.moves: list[float] = []
        self.before: tuple[Tensor, Tensor] | None = None
        layers(model, nn.ReLU)[len(layers(model, nn.ReLU)) // 2].register_forward_pre_hook(self.see)
        self.looking = False

    def see(self, module: nn.Module, given: Any) -> None:
        """How far the channels' means and deviations are from those of the step before, in deviations."""
        if self.looking:
            return
        x = given[0].detach()
        mean, deviation = x.mean((0, 2, 3)), x.std((0, 2, 3))
        if self.before is not None:
            apart = ((mean - self.before[0]).abs() + (deviation - self.before[1]).abs()) / self.before[1]
            self.moves.append(apart.median().item())
        self.before = mean, deviation

    def look(self, step: int) -> None:
        """Measure along the gradient of a fixed batch, then put everything back."""
        if step % self.s.every:
            return
        self.looking = True
        state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.train()
        (loss, gradient), start = self.gradient(), [p.detach().clone() for p in parameters(self.model)]
        losses, changes = [loss], []
        for multiple in self.s.along:
            with torch.no_grad():
                for p, origin, g in zip(parameters(self.model), start, gradient, strict=True):
                    p.copy_(origin - multiple * self.s.rate * g)
            there, other = self.gradient()
            losses.append(there)
            changes.append(
                math.sqrt(sum((a - b).square().sum().item() for a, b in zip(other, gradient, strict=True)))
            )
        self.ranges.append(max(losses) - min(losses))
        self.changes.append(max(changes))
        self.model.load_state_dict(state)
        self.looking = False

    def gradient(self) -> tuple[float, tuple[Tensor, ...]]:
        """The loss of the fixed batch and its gradient."""
        loss = F.cross_entropy(self.model(self.batch[0]), self.batch[1])
        return loss.item(), torch.autograd.grad(loss, parameters(self.model))


def run(s: Setting, trial: Trial) -> Measured:
    """Train the three networks alike."""
    images = trial.images(s.train, 100, half=True)
    numbers: dict[str, float] = {}
    curves: dict[str, list[float]] = {"at": [float(step) for step in range(0, s.steps + 1, s.every)]}
    for kind, norm in _KINDS.items():
        with trial.random():
            model = convolutions(s.channels, norm)
        seen = Landscape(s, model, images)
        sgd = Sgd(s.steps, s.batch, s.rate, momentum=0.0, anneal=False)
        losses = trial.train(model, images, sgd, watch=seen.look)
        losses += [math.nan] * (s.steps - len(losses))
        curves |= {
            f"loss_{kind}": smooth(losses),
            f"range_{kind}": seen.ranges,
            f"change_{kind}": seen.changes,
        }
        numbers[f"steps_{kind}"] = first(curves[f"loss_{kind}"], lambda loss: loss <= s.target)
        numbers[f"range_{kind}"], numbers[f"change_{kind}"] = median(seen.ranges), median(seen.changes)
        numbers[f"moves_{kind}"] = median(seen.moves)
    return Measured(numbers, curves)


def smooth(values: list[float]) -> list[float]:
    """The mean over each value and the nine before it."""
    return [sum(values[max(0, i - 9) : i + 1]) / (i + 1 - max(0, i - 9)) for i in range(len(values))]


def first(values: list[float], wanted: Callable[[float], bool]) -> float:
    """The place of the first value that is wanted; infinite if none is."""
    return next((float(i) for i, value in enumerate(values) if wanted(value)), math.inf)


def draw(figure: Figure, results: Results) -> None:
    """Training losses; the range of the loss and the change of the gradient along a step."""
    panels = figure.subplots(1, 3)
    names = {"with": "batch norm", "without": "without", "noisy": "batch norm and noise"}
    for number, (kind, label) in enumerate(names.items()):
        for panel, what in zip(panels, ("loss", "range", "change"), strict=True):
            values = len(results.seeds[0].curves[f"{what}_{kind}"])
            x: list[float] = list(range(values)) if what == "loss" else results.seeds[0].curves["at"]
            if what == "loss" or kind != "noisy":
                line(panel, x, results, f"{what}_{kind}", number, label=label)
    panels[0].set(ylabel="training loss (nats), mean of 10", title="Training")
    panels[1].set(yscale="log", ylabel="range of the loss along a step", title="Loss along the gradient")
    panels[2].set(
        yscale="log", ylabel="change of the gradient along a step", title="Gradient along the gradient"
    )
    for panel in panels:
        panel.set_xlabel("step")
        panel.legend(loc="lower left" if panel is panels[0] else "best")


STUDY = Study(
    name="landscape",
    title="A smoother landscape",
    claim="Batch norm helps because it makes the loss and its gradient change less along a step, and not "
    "because a layer's input stays where it is: with noise behind each batch norm the input moves more than "
    "without any, and the training is as fast.",
    paper="Santurkar, Tsipras, Ilyas and Madry 2018, “How does batch normalization help optimization?”",
    where="sections 2 and 3, figures 2 and 4",
    tool="`gb.nn.BatchNorm2d`",
    method="Six convolutions on digits of 14 × 14, 300 steps of plain SGD at the rate 0.1, with batch norm, "
    "without, and with batch norm and noise. Every ten steps: loss and gradient of a fixed batch at 0.5 to 4 "
    "times the step along its gradient; the range of the loss and the greatest distance of the gradient from "
    "that at the start; of both the median over the training. A layer's input moves by the change of its "
    "channels' means and deviations from step to step, in deviations.",
    differs="The paper trains VGG on CIFAR-10. He's initialisation, without which the network without batch "
    "norm does not train here.",
    criteria=(
        Criterion(
            "along a step the loss varies at most half as much with batch norm",
            lambda n: n["range_with"] <= n["range_without"] / 2,
        ),
        Criterion(
            "along a step the gradient changes at most half as much with batch norm",
            lambda n: n["change_with"] <= n["change_without"] / 2,
        ),
        Criterion(
            "with noise the input moves more than without batch norm, and more than with batch norm alone",
            lambda n: n["moves_noisy"] > max(n["moves_with"], n["moves_without"]),
        ),
        Criterion(
            "with noise the loss 0.5 takes at most 1.5 times the steps of batch norm, and fewer than without "
            "it",
            lambda n: n["steps_noisy"] <= 1.5 * n["steps_with"] and n["steps_noisy"] < n["steps_without"],
        ),
    ),
    numbers={
        f"{what}_{kind}": f"{label}, {words}"
        for what, label in (
            ("range", "range of the loss along a step"),
            ("change", "change of the gradient along a step"),
            ("moves", "how far a layer's input moves in a step"),
            ("steps", "steps to a training loss of 0.5 (– never)"),
        )
        for kind, words in (("with", "batch norm"), ("without", "without"), ("noisy", "batch norm and noise"))
    },
    setting=Setting(),
    quick=QUICK,
    run=run,
    draw=draw,
    believed="With He's initialisation six layers without batch norm train nearly as fast at this rate, from "
    "some seeds as fast as with it, so there is nothing left that noise could cost and still be ahead. The "
    "paper's network is deeper and starts worse.",
)
