"""Bench 2: the notebook's network and its twin without batch norm: the same weights, the same batches.

The ribbons are those of Ioffe & Szegedy 2015, figure 1: the 15th, 50th and 85th percentile of what enters
each activation.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import nn as gbnn
from ... import reference
from ...train.batches import DeviceImages, generator_for

Activation = Literal["relu", "tanh", "sigmoid"]
TWINS = ("with", "without")
MOMENTUM = 0.9
PROBE, VALUES = 32, 4096  # images that the ribbons are measured on, and values of each layer
JUDGED = 1000  # test images
JUDGE_EVERY, RIBBON_EVERY = 25, 4  # steps
LOST = 30  # steps after which a network no better than guessing counts as lost
_ORDER, _WEIGHTS = 21, 22  # purposes of random streams


@dataclass(frozen=True)
class Track:
    """How a race is set up.

    Attributes:
        rate: learning rate, of gradient descent with Nesterov momentum 0.9; constant.
        batch: images per step.
        scale: factor on the standard deviation √(2 / fan-in) of the first weights (He et al. 2015).
        depth: hidden linear layers of 128 units after the two convolutions; the notebook has one.
        activation: after each hidden layer.
        seed: of the weights and of the batches.
    """

    rate: float = 0.1
    batch: int = 64
    scale: float = 1.0
    depth: int = 1
    activation: Activation = "relu"
    seed: int = 0


def build(track: Track, *, batch_norm: bool, classes: int = 10) -> nn.Sequential:
    """Build one of the twins for 28×28 grey images; both draw the same weights."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()

    def hidden(name: str, producer: nn.Module, features: int, pool: int | None) -> None:
        layers[name] = producer
        at = f"act_{name}"
        if batch_norm:
            kind = gbnn.BatchNorm2d if pool else gbnn.BatchNorm1d
            options: dict[str, Any] = {"pool": pool} if pool else {}
            layers[at] = kind(features, activation=track.activation, **options)
        else:
            plain: list[nn.Module] = [_ACTIVATIONS[track.activation]()]
            layers[at] = nn.Sequential(*plain, *([nn.AvgPool2d(pool)] if pool else []))

    hidden("conv1", nn.Conv2d(1, 20, 3), 20, 2)
    hidden("conv2", nn.Conv2d(20, 50, 5), 50, 2)
    layers["flat"] = nn.Flatten()
    for number in range(1, track.depth + 1):
        hidden(f"fc{number}", nn.Linear(800 if number == 1 else 128, 128), 128, None)
    layers["out"] = nn.Linear(128, classes)
    network = nn.Sequential(layers)
    generator = generator_for(track.seed, _WEIGHTS)
    for layer in network.children():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan_in = layer.weight[0].numel()
            nn.init.normal_(layer.weight, 0, track.scale * math.sqrt(2 / fan_in), generator=generator)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


def entering(network: nn.Sequential, x: Tensor) -> dict[str, Tensor]:
    """What enters each hidden activation for the batch ``x``, by the name of the layer before it.

    Batch norms use the batch's statistics, as in training; nothing is updated.
    """
    found: dict[str, Tensor] = {}
    name = ""
    for child, layer in network.named_children():
        if not child.startswith("act_"):
            name, x = child, layer(x)
            continue
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            batch = reference.batch_statistics(x)
            x = reference.scale_and_shift(
                reference.normalize(x, batch.mean, batch.var, layer.eps), layer.weight, layer.bias
            )
            found[name] = x
            x = F.avg_pool2d(_activate(layer, x), 2) if layer.pool else _activate(layer, x)
        else:
            found[name], x = x, layer(x)
    return found


def _activate(layer: Any, x: Tensor) -> Tensor:
    activated: Tensor = _ACTIVATIONS[layer.activation]()(x)
    return activated


def percentiles(values: Tensor) -> list[float] | None:
    """The 15th, 50th and 85th percentile, of at most 4,096 values spread over all; None if not finite."""
    flat = values.flatten()
    flat = flat[:: max(1, len(flat) // VALUES)]
    found = torch.quantile(flat, torch.tensor([0.15, 0.5, 0.85]))
    return [float(value) for value in found] if bool(found.isfinite().all()) else None


@dataclass
class Runner:
    """One of the twins on its way. ``loss`` is in nats; ``lost`` says how its training failed, if it did."""

    network: nn.Sequential
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    hits: float = 0.0  # moving average of the accuracy on its batches
    judged: float | None = None
    best: float = 0.0
    lost: str | None = None

    def step(self, x: Tensor, labels: Tensor) -> None:
        """Take one step, unless the loss is no number any more."""
        if self.lost and not math.isfinite(self.losses[-1]):
            self.losses.append(float("nan"))
            return
        self.network.train()
        logits = self.network(x)
        loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(float(loss.detach()))
        share = float((logits.argmax(1) == labels).float().mean())
        weight = max(0.05, 1 / len(self.losses))
        self.hits += (share - self.hits) * weight
        self.lost = self._lost(logits.shape[1])

    def _lost(self, classes: int) -> str | None:
        step, loss = len(self.losses), self.losses[-1]
        if not math.isfinite(loss):
            return self.lost or f"Diverged: its loss is not a number since step {step}."
        if step >= LOST and self.hits < 2 / classes:
            worst = f"{max(self.losses):,.0f}" if max(self.losses) > 100 else f"{max(self.losses):.3g}"
            return (
                f"Diverged: its loss rose to {worst}, and it answers no better than guessing "
                f"(loss {loss:.2f}; guessing gives ln {classes} = {math.log(classes):.2f})."
            )
        return None


class Race:
    """Two trainings that take their steps together."""

    def __init__(self, track: Track, images: DeviceImages, test: DeviceImages) -> None:
        self.track, self._images = track, images
        self.steps = 0
        self._generator = generator_for(track.seed, _ORDER)
        self.runners = {twin: _runner(track, twin) for twin in TWINS}
        self._judged_by = test.batch(slice(0, JUDGED))
        self._probe = test.batch(slice(0, PROBE))[0]
        self.ribbons: dict[str, dict[str, list[float] | None]] = {}
        self._measure()

    def step(self) -> None:
        """Take one step with each twin, on the same batch."""
        index = torch.randint(0, len(self._images), (self.track.batch,), generator=self._generator)
        x, labels = self._images.batch(index)
        for runner in self.runners.values():
            runner.step(x, labels)
        self.steps += 1
        if self.steps % RIBBON_EVERY == 0:
            self._measure()
        if self.steps % JUDGE_EVERY == 0:
            self._judge()

    def _measure(self) -> None:
        with torch.no_grad():
            self.ribbons = {
                twin: {
                    name: percentiles(value) for name, value in entering(runner.network, self._probe).items()
                }
                for twin, runner in self.runners.items()
            }

    def _judge(self) -> None:
        x, labels = self._judged_by
        for runner in self.runners.values():
            runner.network.eval()
            with torch.no_grad():
                runner.judged = float((runner.network(x).argmax(1) == labels).float().mean())
            runner.best = max(runner.best, runner.judged)

    def frame(self, since: int) -> dict[str, Any]:
        """What the page draws: losses since a step, accuracies, ribbons, who is lost."""
        return {
            "step": self.steps,
            "since": since,
            "ribbons": self.ribbons,
            "twins": {
                twin: {
                    "losses": runner.losses[since:],
                    "batch_accuracy": runner.hits,
                    "test_accuracy": runner.judged,
                    "best": runner.best,
                    "lost": runner.lost,
                }
                for twin, runner in self.runners.items()
            },
        }


def _runner(track: Track, twin: str) -> Runner:
    network = build(track, batch_norm=twin == "with")
    optimizer = torch.optim.SGD(network.parameters(), lr=track.rate, momentum=MOMENTUM, nesterov=True)
    return Runner(network, optimizer)
