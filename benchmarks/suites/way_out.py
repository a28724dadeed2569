"""A small residual network whose batch norm becomes group norm: what is lost, and what comes back.

The network is trained on Fashion-MNIST (or ``--data``); γ and β are fitted and the network is distilled on
2,000 training images without their labels. Judged on the whole test set.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gammabeta as gb
from gammabeta.data import load

from ..harness import Options, Result

KINDS = ("group", "instance", "layer")
UNLABELLED = 2000


class Block(nn.Module):
    """Two convolutions and a shortcut (He et al. 2016, figure 2)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and inside == outside
            else nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in, (N, outside, H / stride, W / stride) out."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def network() -> nn.Module:
    """Seven convolutions with batch norm, 16 to 64 channels."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        Block(16, 32, 2), Block(32, 64, 2), Block(64, 64, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    return nn.Module.to(model, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


class Batches:
    """Images (N, 1, 28, 28) in [0, 1] and classes, shuffled anew at each pass."""

    def __init__(self, images: Tensor, labels: Tensor | None, size: int, seed: int | None = 0) -> None:
        self.images, self.labels, self.size = images, labels, size
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Any]:
        count = len(self.images)
        order = (
            torch.arange(count) if self.generator is None else torch.randperm(count, generator=self.generator)
        )
        for part in order.split(self.size):
            x = self.images[part].to(memory_format=torch.channels_last)
            yield x if self.labels is None else (x, self.labels[part])


def train(model: nn.Module, batches: Batches, epochs: int) -> None:
    """AdamW with a one-cycle learning rate (Smith 2018)."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    steps = epochs * -(-len(batches.images) // batches.size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(epochs):
        for x, labels in batches:
            loss = nn.functional.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def accuracy(model: nn.Module, batches: Batches) -> float:
    """The share of right classes, in evaluation."""
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == labels).sum()) for x, labels in batches)
    return right / len(batches.images)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="fashion-mnist", help="a data set that `gammabeta train` takes")
    parser.add_argument("--epochs", type=int, default=3, help="of the network with batch norm; %(default)s")
    parser.add_argument("--steps", type=int, default=1000, help="of distillation; %(default)s")


def run(options: Options) -> Result:
    """Train once; replace, fit and distil for each kind."""
    given = options.given
    data = load(given.data)
    images, tests = (torch.from_numpy(s.images) / 255 for s in (data.train, data.test))
    labels, truths = (torch.from_numpy(s.labels).long() for s in (data.train, data.test))
    if options.quick:
        images, labels, tests, truths = images[:6000], labels[:6000], tests[:1000], truths[:1000]
    torch.manual_seed(0)
    old = gb.convert(network())
    train(old, Batches(images, labels, 128), 1 if options.quick else given.epochs)
    gb.recalibrate(old, Batches(images[:10000], None, 500))
    old = gb.convert(old, "torch").eval()
    judge = Batches(tests, truths, 500, seed=None)
    start = accuracy(old, judge)
    unlabelled = Batches(images[:UNLABELLED], None, 64)
    rows = [{"norm": "batch", "accuracy": f"{start:.2%}", "fitted": "", "distilled": "", "seconds": ""}]
    steps, kinds = (50, KINDS[:1]) if options.quick else (given.steps, KINDS)
    rows += [_left(old, kind, unlabelled, judge, steps) for kind in kinds]
    lost = (start - float(rows[1]["distilled"].rstrip("%")) / 100) * 100
    summary = {"points lost with group norm": round(lost, 2), "seconds": rows[1]["seconds"]}
    notes = [f"{Path(given.data).name}; fitted and distilled on {UNLABELLED} images without labels."]
    return Result("Batch norm replaced by other norms", rows, summary, notes)


def _left(old: nn.Module, kind: str, unlabelled: Batches, judge: Batches, steps: int) -> dict[str, str]:
    plain = accuracy(gb.convert(old, kind), judge)
    began = time.perf_counter()
    new = gb.convert(old, kind, fit=unlabelled)
    fitted = accuracy(new, judge)
    gb.distil(new, old, unlabelled, steps=steps)
    seconds = time.perf_counter() - began
    return {
        "norm": kind,
        "accuracy": f"{plain:.2%}",
        "fitted": f"{fitted:.2%}",
        "distilled": f"{accuracy(new, judge):.2%}",
        "seconds": f"{seconds:.0f}",
    }
