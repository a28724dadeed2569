"""Bjorck et al. 2018: batch norm allows larger steps, since activations cannot grow with depth."""

import math
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import gammabeta.nn as ours

from .networks import Norm
from .pictures import line
from .study import Criterion, Measured, Results, Study
from .trial import Images, Sgd, Trial

_KINDS: dict[str, Norm] = {"with": ours.BatchNorm1d, "without": lambda width: nn.Identity()}
_RATES = [10 ** (exponent / 2) for exponent in range(-16, 5)]  # 1e-8 to 100, by factors of 3.2


@dataclass(frozen=True)
class Setting:
    """A rate is tried for so many ``steps``."""

    train: int = 4000
    width: int = 64
    batch: int = 128
    steps: int = 40
    depths: tuple[int, ...] = (2, 4, 8, 16, 32)


QUICK = Setting(train=500, width=16, steps=6)


class Block(nn.Module):
    """x + norm(W₂ ReLU(norm(W₁ x))), Xavier's initialisation."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        first, second = (nn.Linear(width, width, bias=False) for _ in range(2))
        for linear in (first, second):
            nn.init.xavier_normal_(linear.weight)
        norm = _KINDS[kind]
        self.branch = nn.Sequential(first, norm(width), nn.ReLU(), second, norm(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        out: Tensor = x + self.branch(x)
        return out


def network(s: Setting, trial: Trial, kind: str, depth: int) -> nn.Sequential:
    """A perceptron of ``depth`` residual blocks."""
    with trial.random(depth):
        blocks = [Block(s.width, kind) for _ in range(depth)]
        return nn.Sequential(nn.Flatten(), nn.Linear(14 * 14, s.width), *blocks, nn.Linear(s.width, 10))


def diverges(s: Setting, trial: Trial, images: Images, model: nn.Module, rate: float) -> bool:
    """Whether the loss becomes infinite, or is on the average of the last quarter above what it was."""
    losses = trial.train(model, images, Sgd(s.steps, s.batch, rate, momentum=0.0, anneal=False))
    last = losses[-(s.steps // 4) :]
    return len(losses) < s.steps or not math.isfinite(losses[-1]) or sum(last) / len(last) > losses[0]


def largest(s: Setting, trial: Trial, images: Images, kind: str, depth: int) -> float:
    """The largest rate that does not diverge, by halving the list of rates."""
    low, high = 0, len(_RATES)  # rates below `low` are fine, those from `high` on diverge
    while low < high:
        middle = (low + high) // 2
        if diverges(s, trial, images, network(s, trial, kind, depth), _RATES[middle]):
            high = middle
        else:
            low = middle + 1
    return _RATES[low - 1] if low else math.nan


@torch.no_grad()
def growth(s: Setting, trial: Trial, images: Images, kind: str) -> list[float]:
    """The deviation of the activations behind each block of the deepest network, before any training."""
    x, deviations = images.x[:512], []
    for module in network(s, trial, kind, s.depths[-1]):
        x = module(x)
        if isinstance(module, Block):
            deviations.append(x.std().item())
    return deviations


def run(s: Setting, trial: Trial) -> Measured:
    """Find the largest rate for every depth, with and without."""
    images = trial.images(s.train, 100, half=True)
    numbers: dict[str, float] = {}
    curves: dict[str, list[float]] = {}
    for kind in _KINDS:
        curves[f"rate_{kind}"] = [largest(s, trial, images, kind, depth) for depth in s.depths]
        curves[f"growth_{kind}"] = growth(s, trial, images, kind)
        numbers[f"shallow_{kind}"], numbers[f"deep_{kind}"] = (
            curves[f"rate_{kind}"][0],
            curves[f"rate_{kind}"][-1],
        )
        numbers[f"growth_{kind}"] = curves[f"growth_{kind}"][-1] / curves[f"growth_{kind}"][0]
    numbers["ratio_least"] = min(
        a / b for a, b in zip(curves["rate_with"], curves["rate_without"], strict=True)
    )
    numbers["ratio_shallow"] = numbers["shallow_with"] / numbers["shallow_without"]
    numbers["ratio_deep"] = numbers["deep_with"] / numbers["deep_without"]
    return Measured(numbers, curves)


def draw(figure: Figure, results: Results) -> None:
    """Rates over depth, and activations over depth."""
    left, right = figure.subplots(1, 2)
    blocks = list(range(1, len(results.seeds[0].curves["growth_with"]) + 1))
    for number, kind in enumerate(_KINDS):
        line(left, Setting().depths, results, f"rate_{kind}", number, marker="o", label=f"{kind} batch norm")
        line(right, blocks, results, f"growth_{kind}", number, label=f"{kind} batch norm")
    left.set(yscale="log", xlabel="residual blocks", title="Largest rate that does not diverge")
    left.set_xscale("log", base=2)
    left.set_xticks(Setting().depths, map(str, Setting().depths))
    left.set_ylabel("learning rate")
    right.set(yscale="log", xlabel="block", ylabel="deviation", title="Activations at initialisation")
    for panel in (left, right):
        panel.legend()


STUDY = Study(
    name="larger-steps",
    title="Larger steps",
    claim="Batch norm primarily allows larger steps: without it activations grow with depth, and the deeper "
    "the network the smaller the rate at which it diverges.",
    paper="Bjorck, Gomes, Selman and Weinberger 2018, “Understanding batch normalization”",
    where="sections 2 and 3, the figures of diverging activations",
    tool="`gb.nn.BatchNorm1d`",
    method="Residual perceptrons of 2 to 32 blocks, 64 wide, Xavier's initialisation, on digits of 14 × 14. "
    "The largest of the rates 10^(k/2) at which 40 steps of plain SGD do not diverge: the loss stays finite "
    "and is below its first value over the last ten steps. And the deviation of the activations behind every "
    "block at initialisation.",
    differs="Perceptrons on MNIST; the paper trains residual networks of 110 layers on CIFAR-10 and shows "
    "the activations while a training diverges.",
    criteria=(
        Criterion(
            "with 32 blocks the largest rate with batch norm is at least 30 times that without, and at no "
            "depth smaller",
            lambda n: n["ratio_deep"] >= 30 and n["ratio_least"] >= 1,
        ),
        Criterion(
            "that ratio is at least 10 times as large with 32 blocks as with 2",
            lambda n: n["ratio_deep"] >= 10 * n["ratio_shallow"],
        ),
        Criterion(
            "over 32 blocks the activations grow at least 50-fold without batch norm, and at most 10-fold "
            "with it",
            lambda n: n["growth_without"] >= 50 and n["growth_with"] <= 10,
        ),
    ),
    numbers={
        "shallow_with": "largest rate, 2 blocks, with batch norm",
        "shallow_without": "without",
        "deep_with": "largest rate, 32 blocks, with batch norm",
        "deep_without": "without",
        "ratio_least": "largest rate with over without, the least over depths",
        "ratio_shallow": "the same with 2 blocks",
        "ratio_deep": "the same with 32 blocks",
        "growth_with": "activations behind the last block over the first, with batch norm",
        "growth_without": "without",
    },
    setting=Setting(),
    quick=QUICK,
    run=run,
    draw=draw,
)
