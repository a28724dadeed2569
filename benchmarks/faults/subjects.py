"""Healthy models of several kinds, trained briefly on MNIST: what the doctor must find nothing wrong with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gammabeta.data import load
from gammabeta.nn import BatchNorm2d as FusedBatchNorm2d
from gammabeta.nn import FrozenBatchNorm2d

TRAINED, PASSES, BATCH = 2048, 4, 64
INSPECTED = 512
_DEEP = ("model", "optimizer")


@dataclass
class Subject:
    """A trained model with everything that a diagnosis can use."""

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor | None
    batch: int = BATCH
    order: Tensor | None = None
    optimizer: torch.optim.Optimizer | None = None
    source: Any = None
    uneven: tuple[int, ...] = ()

    def loader(self) -> list[Any]:
        """Batches as the subject asks for: shuffled once with a fixed seed unless it says otherwise."""
        order = self.order
        if order is None:
            order = torch.randperm(len(self.inputs), generator=torch.Generator().manual_seed(7))
        sizes = list(self.uneven) or self.batch
        return [
            (self.inputs[index], None if self.targets is None else self.targets[index])
            for index in order[: sum(self.uneven) or len(order)].split(sizes)
        ]

    @property
    def loss(self) -> Callable[[Any, Any], Any] | None:
        """Cross-entropy where there are classes, a logistic loss for real or generated, else none."""
        if self.targets is None:
            return None
        return F.binary_cross_entropy_with_logits if self.targets.is_floating_point() else F.cross_entropy

    def copy(self, **changes: Any) -> Subject:
        """An independent copy with some changes; model and optimiser are copied together."""
        kept = {"model": self.model, "optimizer": self.optimizer} | {
            k: v for k, v in changes.items() if k in _DEEP
        }
        return replace(self, **(changes | copy.deepcopy(kept)))


@cache
def digits() -> tuple[Tensor, Tensor]:
    """The first images of MNIST's training set in [0, 1], and their labels."""
    train = load("mnist").train
    images = torch.from_numpy(train.images[: TRAINED + INSPECTED].copy()).float() / 255
    return images, torch.from_numpy(train.labels[: TRAINED + INSPECTED].copy()).long()


def mlp() -> nn.Sequential:
    """Fully connected, BatchNorm1d."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 64, bias=False),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, 32, bias=False),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def cnn(layer: Callable[..., nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """Two convolutions, a fully connected layer, dropout behind the last normalization."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        layer(8),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, bias=False),
        layer(16),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(400, 10),
    )


def volume() -> nn.Module:
    """Three-dimensional convolutions over a stack of shifted digits."""
    return nn.Sequential(
        nn.Conv3d(1, 6, 3, bias=False),
        nn.BatchNorm3d(6),
        nn.ReLU(),
        nn.AvgPool3d(2),
        nn.Conv3d(6, 12, (2, 3, 3), bias=False),
        nn.BatchNorm3d(12),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(10),
    )


class Residual(nn.Module):
    """A stem and two residual blocks; ReLU by function, not by module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList(nn.ModuleDict(_block()) for _ in range(2))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = F.relu(self.stem_norm(self.stem(x)))
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            y = F.relu(block["norm1"](block["conv1"](x)))
            x = F.relu(x + block["norm2"](block["conv2"](y)))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def _block() -> dict[str, nn.Module]:
    return {
        "conv1": nn.Conv2d(8, 8, 3, padding=1, bias=False),
        "norm1": nn.BatchNorm2d(8),
        "conv2": nn.Conv2d(8, 8, 3, padding=1, bias=False),
        "norm2": nn.BatchNorm2d(8),
    }


class Reused(nn.Module):
    """One encoder for two views of each digit: every normalization is called twice per forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.head = nn.Linear(2 * 576, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, from the digit and its mirror image."""
        views = [self.encoder(x), self.encoder(x.flip(-1))]
        out: Tensor = self.head(torch.cat(views, 1))
        return out


def generator() -> nn.Module:
    """Noise to digit."""
    return nn.Sequential(
        nn.Linear(16, 16 * 7 * 7, bias=False),
        nn.Unflatten(1, (16, 7, 7)),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1),
        nn.Sigmoid(),
    )


def discriminator() -> nn.Module:
    """Digit to one logit."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 4, stride=2),
        nn.LeakyReLU(0.2),
        nn.Conv2d(8, 16, 4, stride=2, bias=False),
        nn.BatchNorm2d(16),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(400, 1),
        nn.Flatten(0),
    )


def train(
    model: nn.Module, inputs: Tensor, targets: Tensor, *, groups: Tensor | None = None
) -> torch.optim.Optimizer:
    """Adam with a learning rate that falls linearly to zero, so that the averages can catch up.

    With ``groups``, one number per sample, each batch is drawn from one group alone.
    """
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    steps: list[Tensor] = []
    for _ in range(PASSES):
        order = torch.randperm(len(inputs))
        if groups is not None:
            order = order[groups[order].argsort(stable=True)]
        batches = order.split(BATCH)
        steps += [batches[i] for i in torch.randperm(len(batches))]
    for step, index in enumerate(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / len(steps))
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(inputs[index]), targets[index]))
        optimizer.step()
    return optimizer


def _classifier(name: str, model: nn.Module, prepare: Callable[[Tensor], Tensor]) -> Subject:
    images, labels = digits()
    inputs = prepare(images)
    with torch.no_grad():
        model(inputs[:2])  # sizes the lazy layers
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(
                module, FrozenBatchNorm2d
            ):
                module.reset_running_stats()
    optimizer = train(model, inputs[:TRAINED], labels[:TRAINED])
    model.eval()
    return Subject(name, model, inputs[TRAINED:], labels[TRAINED:], optimizer=optimizer)


def _stack(images: Tensor) -> Tensor:
    """(N, 1, 6, 14, 14): each digit at half size, shifted a little from slice to slice."""
    small = F.avg_pool2d(images, 2)
    return torch.stack([small.roll(shift, -1) for shift in range(-2, 4)], 2)


def _frozen() -> nn.Module:
    """A trained backbone, its normalization frozen, with a new head."""
    images, labels = digits()
    backbone = cnn()
    train(backbone, images[:TRAINED], labels[:TRAINED])
    for name, module in list(backbone.named_children()):
        if isinstance(module, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(module.num_features)
            frozen.load_state_dict(module.state_dict())
            setattr(backbone, name, frozen)
    for module in list(backbone.children())[:-1]:
        module.requires_grad_(False)
    backbone[-1] = nn.Linear(400, 10)
    return backbone


def _gan() -> tuple[Subject, Subject]:
    """Generator and discriminator, trained in turns.

    The discriminator sees real and generated digits in one batch, and is in evaluation while the generator
    learns from it, so that its statistics are those of what it is asked to tell apart.
    """
    images, _ = digits()
    made, judge = generator(), discriminator()
    first = torch.optim.Adam(made.parameters(), lr=2e-3, betas=(0.5, 0.99))
    second = torch.optim.Adam(judge.parameters(), lr=5e-4, betas=(0.5, 0.99))
    steps = [index for _ in range(PASSES) for index in torch.randperm(TRAINED).split(BATCH)]
    for step, index in enumerate(steps):
        for group in (*first.param_groups, *second.param_groups):
            group["lr"] = (2e-3 if group in first.param_groups else 5e-4) * (1 - step / len(steps))
        made.train()
        judge.train()
        fake = made(torch.randn(len(index), 16))
        mixed = torch.cat([images[index], fake.detach()])
        truth = torch.cat([torch.ones(len(index)), torch.zeros(len(fake))])
        second.zero_grad()
        torch.autograd.backward(F.binary_cross_entropy_with_logits(judge(mixed), truth))
        second.step()
        judge.eval()
        first.zero_grad()
        torch.autograd.backward(F.binary_cross_entropy_with_logits(judge(fake), torch.ones(len(fake))))
        first.step()
    made.eval()
    with torch.no_grad():
        fake = made(torch.randn(INSPECTED // 2, 16))
    mixed = torch.cat([images[TRAINED : TRAINED + INSPECTED // 2], fake])
    truth = torch.cat([torch.ones(INSPECTED // 2), torch.zeros(INSPECTED // 2)])
    return (
        Subject("generator", made, torch.randn(INSPECTED, 16), None, optimizer=first),
        Subject("discriminator", judge, mixed, truth, optimizer=second),
    )


def subjects(seed: int, only: Collection[str] | None = None) -> Iterator[Subject]:
    """Every healthy model, trained from this seed; ``only`` names the kinds to train."""
    kinds: list[tuple[str, Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = [
        ("mlp", mlp, lambda x: x),
        ("cnn", cnn, lambda x: x),
        ("fused cnn", lambda: cnn(FusedBatchNorm2d), lambda x: x),
        ("3-D", volume, _stack),
        ("residual", Residual, lambda x: x),
        ("reused", Reused, lambda x: x),
        ("frozen", _frozen, lambda x: x),
    ]
    for name, build, prepare in kinds:
        if only is None or name in only:
            torch.manual_seed(1000 + seed)
            yield _classifier(name, build(), prepare)
    if only is None or {"generator", "discriminator"} & set(only):
        torch.manual_seed(1000 + seed)
        yield from _gan()
