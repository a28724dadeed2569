"""van Laarhoven 2017, Zhang et al. 2019: before batch norm, weight decay only sets the effective rate."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import gammabeta.nn as ours

from ..stats.recalibrate import recalibrate
from .pictures import color, line
from .study import Criterion, Measured, Results, Study
from .trial import Images, Sgd, Trial, accuracy, outputs

_PAIRS = ((0.2, 0.025), (0.1, 0.05), (0.05, 0.1))  # rate and decay, of one product
_STRONGER = (0.1, 0.2)  # a product four times as large


@dataclass(frozen=True)
class Setting:
    """``twin`` steps for the network without decay, ``steps`` until the norm of the weights is steady."""

    train: int = 5000
    test: int = 5000
    width: int = 100
    batch: int = 100
    twin: int = 300
    steps: int = 1500
    watched: int = 50


QUICK = Setting(train=500, test=500, width=20, twin=20, steps=20, watched=10)


class Network(nn.Module):
    """Linear layers without bias, a batch norm without scale and shift behind each, the last too."""

    def __init__(self, width: int, pixels: int) -> None:
        super().__init__()
        sizes = (pixels, width, width, 10)
        self.linears: Any = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))
        norms = [ours.BatchNorm1d(n, affine=False, activation="relu") for n in sizes[1:-1]]
        self.norms: Any = nn.ModuleList([*norms, ours.BatchNorm1d(10, affine=False)])

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = x.flatten(1)
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = norm(linear(x))
        return x

    def weights(self) -> list[Tensor]:
        """All that learns."""
        return [linear.weight for linear in self.linears]


class Scheduled(torch.optim.SGD):
    """SGD without decay whose rate grows as it must: η (1 − ηλ)^(−2t − 1) at step t."""

    def __init__(self, weights: list[Tensor], rate: float, decay: float) -> None:
        super().__init__(weights, lr=rate / (1 - rate * decay))
        self.growth = (1 - rate * decay) ** -2

    def step(self, closure: Any = None) -> Any:
        """Take a step, then raise the rate."""
        loss = super().step(closure)
        for group in self.param_groups:
            group["lr"] *= self.growth
        return loss


def run(s: Setting, trial: Trial) -> Measured:
    """Train with decay, without it at the equivalent rate, and at several rates until the norm is steady."""
    images = trial.images(s.train, s.test, half=True)
    numbers, curves = twins(s, trial, images)
    for i, (rate, decay) in enumerate((*_PAIRS, _STRONGER)):
        model = network(s, trial)
        norms: list[float] = []

        def watch(step: int, model: Network = model, norms: list[float] = norms) -> None:
            if step % s.watched == 0:
                norms.append(model.weights()[1].square().sum().item())

        sgd = Sgd(s.steps, s.batch, rate, momentum=0.0, decay=decay, anneal=False)
        trial.train(model, images, sgd, watch=watch)
        numbers[f"effective_{i}"] = rate / norms[-1]
        curves[f"effective_{i}"] = [rate / norm for norm in norms]
    effective = [numbers[f"effective_{i}"] for i in range(len(_PAIRS))]
    numbers["spread"] = max(effective) / min(effective)
    numbers["stronger"] = numbers[f"effective_{len(_PAIRS)}"] / (sum(effective) / len(effective))
    return Measured(numbers, curves)


def network(s: Setting, trial: Trial) -> Network:
    """The same first weights whenever it is called."""
    with trial.random():
        return Network(s.width, 14 * 14)


def twins(s: Setting, trial: Trial, images: Images) -> tuple[dict[str, float], dict[str, list[float]]]:
    """A network with decay and one without at the rate that corresponds, step by step in float64."""
    rate, decay = 0.1, 0.05
    images = Images(images.x.double(), images.y, images.test_x.double(), images.test_y)
    logits: dict[str, Tensor] = {}
    losses: dict[str, list[float]] = {}
    numbers: dict[str, float] = {}
    for name in ("decay", "scheduled"):
        model = network(s, trial).double()
        for norm in model.norms:
            norm.eps = 1e-30  # eps is what keeps batch norm from ignoring the weights' scale
        sgd = Sgd(s.twin, s.batch, rate, momentum=0.0, decay=decay, anneal=False)
        optimizer = None if name == "decay" else Scheduled(model.weights(), rate, decay)
        losses[name] = trial.train(model, images, sgd, optimizer=optimizer)
        recalibrate(model, images.batches(500))
        logits[name] = outputs(model, images.test_x)
        numbers[f"accuracy_{name}"] = accuracy(model, images.test_x, images.test_y)
        numbers[f"norm_{name}"] = math.sqrt(sum(w.square().sum().item() for w in model.weights()))
    numbers["difference"] = (logits["decay"] - logits["scheduled"]).abs().max().item()
    half = network(s, trial)
    before = gradient(half, images)
    with torch.no_grad():
        half.weights()[1].mul_(2)
    numbers["gradient"] = gradient(half, images) / before
    return numbers, {"loss_decay": losses["decay"], "loss_scheduled": losses["scheduled"]}


def gradient(model: Network, images: Images) -> float:
    """The norm of the loss's gradient with respect to the second layer's weights."""
    loss = F.cross_entropy(model(images.x[:500].float()), images.y[:500])
    return float(torch.autograd.grad(loss, model.weights()[1])[0].norm())


def draw(figure: Figure, results: Results) -> None:
    """The twins' losses, and the effective rates."""
    left, right = figure.subplots(1, 2)
    steps = list(range(len(results.seeds[0].curves["loss_decay"])))
    line(left, steps, results, "loss_decay", 0, label="weight decay, constant rate", linewidth=3)
    line(
        left, steps, results, "loss_scheduled", 1, label="no decay, growing rate", linestyle="--", linewidth=1
    )
    left.set(xlabel="step", ylabel="training loss (nats)", title="One training, in two ways")
    left.legend()
    x = list(range(len(results.seeds[0].curves["effective_0"])))
    for i, (rate, decay) in enumerate((*_PAIRS, _STRONGER)):
        label = f"rate {rate:g}, decay {decay:g} (product {rate * decay:g})"
        line(right, x, results, f"effective_{i}", i, label=label)
    right.set(yscale="log", xlabel="steps / 50", ylabel="rate / squared norm of the weights")
    right.set_title("The product decides where the effective rate ends")
    right.axhline(0, color=color(0), linewidth=0)
    right.legend()


STUDY = Study(
    name="weight-decay",
    title="Weight decay without a scale",
    claim="The scale of weights before a batch norm changes no output, so their decay regularises nothing by "
    "itself: it only sets the effective learning rate, the rate over the squared norm of the weights.",
    paper="van Laarhoven 2017, “L2 regularization versus batch and weight normalization”; Zhang, Wang, Xu "
    "and Grosse 2019, “Three mechanisms of weight decay regularization”",
    where="van Laarhoven section 3; Zhang et al., the mechanism by the effective rate",
    tool="`gb.recalibrate` (the running averages of the two trainings differ, since they mix weights of "
    "several scales)",
    method="Three linear layers, each before a batch norm without scale and shift, trained by plain SGD in "
    "float64 with decay λ at the rate η; then without decay at the rate η(1 − ηλ)^(−2t−1) of step t, which "
    "the claim says is the same training. Then four pairs of rate and decay in float32, until the norms of "
    "the weights are steady.",
    differs="MNIST at 14 × 14 and a perceptron, where the papers train convolutional networks on CIFAR-10. "
    "The exact schedule is our own consequence of the papers' equations.",
    criteria=(
        Criterion(
            "the network with decay and the one with the growing rate give the same test outputs, to 0.001, "
            "while the "
            "norms of their weights differ by half or more",
            lambda n: n["difference"] < 1e-3 and n["norm_scheduled"] > 1.5 * n["norm_decay"],
        ),
        Criterion(
            "weights twice as large have half the gradient, within 1 %",
            lambda n: abs(n["gradient"] - 0.5) < 0.005,
        ),
        Criterion(
            "three pairs with the same product of rate and decay end at effective rates within 15 % of each "
            "other",
            lambda n: n["spread"] < 1.15,
        ),
        Criterion(
            "a product four times as large ends at an effective rate 1.5 to 3 times as high (theory about 2, "
            "the root)",
            lambda n: 1.5 < n["stronger"] < 3,
        ),
    ),
    numbers={
        "accuracy_decay": "test accuracy with decay, %",
        "accuracy_scheduled": "test accuracy without decay at the growing rate, %",
        "difference": "greatest difference of their test logits",
        "norm_decay": "norm of the weights with decay",
        "norm_scheduled": "norm of the weights without",
        "gradient": "gradient at weights twice as large, as a multiple",
        "spread": "largest effective rate over the smallest, three pairs of one product",
        "stronger": "effective rate at four times the product, as a multiple",
    },
    setting=Setting(),
    quick=QUICK,
    run=run,
    draw=draw,
)
