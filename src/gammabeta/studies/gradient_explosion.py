"""Yang et al. 2019: batch norm makes gradients explode in a network that has not been trained."""

import math
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import gammabeta.nn as ours

from .pictures import line
from .study import Criterion, Measured, Results, Study
from .trial import Trial

_RELU = math.pi / (math.pi - 1)  # 1.467


@dataclass(frozen=True)
class Setting:
    """``ends`` layers at either end are left out of the rate: they see the loss, or the input."""

    width: int = 1000
    depth: int = 40
    batch: int = 256
    ends: int = 5


QUICK = Setting(width=100, depth=12, batch=64, ends=2)


class Layer(nn.Module):
    """Linear, batch norm and an activation; He's initialisation."""

    def __init__(self, width: int, activation: str | None) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        self.norm = ours.BatchNorm1d(width, activation=activation)
        nn.init.normal_(self.linear.weight, std=math.sqrt(2 / width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        out: Tensor = self.norm(self.linear(x))
        return out


def gradients(s: Setting, activation: str | None) -> list[float]:
    """The mean squared gradient at the input of each layer, from the first to the last."""
    x = torch.randn(s.batch, s.width)
    inputs: list[Tensor] = []
    for _ in range(s.depth):
        x = x.detach().requires_grad_() if not inputs else x
        x.retain_grad()
        inputs.append(x)
        x = Layer(s.width, activation)(x)
    x.backward(torch.randn_like(x))
    return [each.grad.square().mean().item() for each in inputs if each.grad is not None]


def rate(squares: list[float], ends: int) -> float:
    """By what a layer multiplies the squared gradient: the geometric mean over the inner layers."""
    inner = squares[ends : len(squares) - ends]
    return float((inner[0] / inner[-1]) ** (1 / (len(inner) - 1)))


def run(s: Setting, trial: Trial) -> Measured:
    """Measure both activations' rates at initialisation."""
    with trial.random():
        relu, linear = gradients(s, "relu"), gradients(s, None)
    theory = (s.batch - 2) / (s.batch - 3)
    numbers = {"relu": rate(relu, s.ends), "linear": rate(linear, s.ends), "theory": theory}
    curves = {"relu": [g / relu[-1] for g in relu], "linear": [g / linear[-1] for g in linear]}
    return Measured(numbers, curves)


def draw(figure: Figure, results: Results) -> None:
    """Squared gradients over depth."""
    axes = figure.subplots()
    depth = len(results.seeds[0].curves["relu"])
    x = list(range(depth))
    line(
        axes, x, results, "relu", 1, label=f"batch norm and ReLU: × {results.spread('relu').mean:.3f} a layer"
    )
    axes.plot(x, [_RELU ** (depth - 1 - i) for i in x], ":", color="gray", label="theory: × 1.467")
    line(axes, x, results, "linear", 0, label=f"batch norm alone: × {results.spread('linear').mean:.3f}")
    axes.set(
        yscale="log", xlabel="layer (0 is nearest to the input)", ylabel="squared gradient, last layer = 1"
    )
    axes.legend()


STUDY = Study(
    name="gradient-explosion",
    title="Gradients explode without training",
    claim="In a wide network that has not been trained, batch norm and ReLU multiply the squared gradient by "
    "π/(π − 1) = 1.467 from each layer to the one before, whatever the initial variance of the weights; "
    "batch norm alone by about (B − 2)/(B − 3) for a batch of B.",
    paper="Yang, Pennington, Rao, Sohl-Dickstein and Schoenholz 2019, “A mean field theory of batch "
    "normalization”",
    where="abstract, and the sections on gradients of ReLU and of linear networks",
    tool="`gb.nn.BatchNorm1d(activation=…)`",
    method="A random input goes through 40 layers of 1,000 units, a random gradient comes back; nothing is "
    "trained. The rate is the geometric mean over the layers but five at either end.",
    differs="Width 1,000 where the theory's is infinite.",
    criteria=(
        Criterion(
            "with ReLU the rate is within 2 % of π/(π − 1)", lambda n: abs(n["relu"] / _RELU - 1) < 0.02
        ),
        Criterion(
            "without an activation it is within 1 % of (B − 2)/(B − 3)",
            lambda n: abs(n["linear"] / n["theory"] - 1) < 0.01,
        ),
    ),
    numbers={
        "relu": "squared gradient, factor a layer, batch norm and ReLU (theory 1.467)",
        "linear": "the same, batch norm alone",
        "theory": "(B − 2)/(B − 3)",
    },
    setting=Setting(),
    quick=QUICK,
    run=run,
    draw=draw,
    data="",
)
