"""What the cases share: data, networks, a training loop under the guard, and what a case hands over."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import gammabeta as gb

CLASSES = 4
Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Source:
    """A public report: where, what was said, the cause that was settled on, what a tool should say."""

    name: str
    url: str
    kind: str
    reported: str
    cause: str
    fix: str
    expect: tuple[str, ...]
    half: str


@dataclass
class Case:
    """What a user who seeks help has in hand. ``noticed``: what the guard said while the case was trained."""

    model: nn.Module
    loader: Iterable[Any] | None = None
    loss: Callable[[Any, Any], Any] | None = F.cross_entropy
    optimizer: torch.optim.Optimizer | None = None
    source: Any = None
    noticed: list[Any] = field(default_factory=list)


CASES: dict[str, Callable[[], Case]] = {}


def case(name: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Register a case under its source's name."""

    def register(make: Callable[[], Case]) -> Callable[[], Case]:
        CASES[name] = make
        return make

    return register


@cache
def sources() -> dict[str, Source]:
    """All reports by name."""
    text = Path(__file__).with_name("sources.toml").read_text("utf-8")
    rows = tomllib.loads(text)["source"]
    return {row["name"]: Source(**(row | {"expect": tuple(row["expect"])})) for row in rows}


class NoSymptomError(AssertionError):
    """A case that does not show what was reported."""


def symptom(shown: bool, what: str) -> None:
    """Insist that the reported symptom is there."""
    if not shown:
        raise NoSymptomError(what)


def pictures(count: int = 512, *, shift: float = 0.0, scale: float = 1.0, seed: int = 0) -> Data:
    """Colour pictures (N, 3, 8, 8) about in [0, 1] of four classes, each a pattern under noise."""
    fixed = torch.Generator().manual_seed(99)
    patterns = torch.rand(CLASSES, 3, 8, 8, generator=fixed)
    patterns = F.avg_pool2d(patterns, 3, 1, 1) * torch.tensor([1.0, 0.7, 0.4]).view(3, 1, 1)
    drawn = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=drawn)
    noise = 0.15 * torch.randn(count, 3, 8, 8, generator=drawn)
    brightness = 1 + 0.2 * torch.randn(count, 1, 1, 1, generator=drawn)
    return scale * (patterns[labels] * brightness + noise) + shift, labels


def cnn(layer: Callable[..., nn.Module] = nn.BatchNorm2d, **settings: Any) -> nn.Sequential:
    """Two convolutions with norms, pooling, a linear head."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        layer(8, **settings),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        layer(16, **settings),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )


def mlp(width: int = 32, **settings: Any) -> nn.Sequential:
    """Two linear layers with norms between."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(192, width, bias=False),
        nn.BatchNorm1d(width, **settings),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width, **settings),
        nn.ReLU(),
        nn.Linear(width, CLASSES),
    )


def norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms of a model."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def batches(data: Data, size: int = 32, *, order: Tensor | None = None) -> list[Data]:
    """Batches in random order, the same each time, or in the order given."""
    if order is None:
        order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(5))
    return [(data[0][index], data[1][index]) for index in order.split(size)]


@dataclass
class Loop:
    """A plain training loop; ``before`` and ``after`` each step are the places where people err."""

    steps: int = 80
    lr: float = 1e-2
    before: Callable[[int], object] = lambda step: None
    after: Callable[[int], object] = lambda step: None
    loss: Callable[[Any, Any], Any] = F.cross_entropy
    watched: bool = True
    falls: bool = True  # whether the learning rate falls to zero, so that averages catch up

    def train(self, model: nn.Module, loader: list[Data]) -> tuple[torch.optim.Optimizer, list[Any]]:
        """Train what learns; return the optimiser and what the guard noticed."""
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=self.lr)
        noticed: list[Any] = []
        guard = gb.watch(model, optimizer, tell=noticed.append) if self.watched else None
        for step in range(self.steps):
            self.before(step)
            optimizer.param_groups[0]["lr"] = self.lr * (1 - step / self.steps if self.falls else 1)
            x, y = loader[step % len(loader)]
            optimizer.zero_grad()
            torch.autograd.backward(self.loss(model(x), y))
            optimizer.step()
            self.after(step)
        if guard is not None:
            guard.close()
        return optimizer, noticed


def trained(
    model: nn.Module | None = None, data: Data | None = None, **loop: Any
) -> tuple[nn.Module, torch.optim.Optimizer, list[Any]]:
    """A network that has learned the pictures."""
    torch.manual_seed(0)
    model = cnn() if model is None else model
    optimizer, noticed = Loop(**loop).train(model.train(), batches(data or pictures()))
    return model, optimizer, noticed


def healthy() -> nn.Module:
    """A trained network without a fault, a copy each time."""
    return copy.deepcopy(_healthy())


@cache
def _healthy() -> nn.Module:
    return trained(watched=False)[0]


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, *, training: bool = False, batch: int = 64) -> float:
    """The share of right answers; ``training``: by batch statistics, on a copy."""
    model = copy.deepcopy(model).train() if training else model.eval()
    hits = sum(float((model(x).argmax(1) == y).sum()) for x, y in batches(data, batch))
    return hits / len(data[0])


@torch.no_grad()
def behind(model: nn.Module, data: Data) -> float:
    """The loss in evaluation over that by batch statistics (with a little added to both)."""
    x, y = data
    evaluated = F.cross_entropy(model.eval()(x), y)
    by_batch = F.cross_entropy(copy.deepcopy(model).train()(x), y)
    return float((evaluated + 0.02) / (by_batch + 0.02))


def average(into: nn.Module, model: nn.Module, keep: float, *, buffers: bool = False) -> None:
    """A moving average of parameters, and of buffers if wanted."""
    with torch.no_grad():
        for old, new in zip(into.parameters(), model.parameters(), strict=True):
            old.mul_(keep).add_(new, alpha=1 - keep)
        if buffers:
            for old, new in zip(into.buffers(), model.buffers(), strict=True):
                if old.is_floating_point():
                    old.mul_(keep).add_(new, alpha=1 - keep)
