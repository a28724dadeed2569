"""Jordan et al. 2023, REPAIR: an average of two networks fails for its statistics, and new ones repair it."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import gammabeta.nn as ours

from ..stats.recalibrate import recalibrate
from .matching import assign
from .networks import convolutions
from .pictures import line
from .study import Criterion, Measured, Results, Study
from .trial import Images, Sgd, Trial, accuracy, layers, outputs

_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Setting:
    """Two networks, each trained for so many ``steps``."""

    train: int = 10_000
    test: int = 4000
    channels: tuple[int, ...] = (16, 32, 32, 32, 32, 32)
    batch: int = 100
    steps: int = 600
    rate: float = 0.05


QUICK = Setting(train=500, test=300, channels=(4, 8, 8, 8), batch=50, steps=30)


def trained(s: Setting, trial: Trial, images: Images, number: int) -> Any:
    """A network of its own first weights and its own order of the images."""
    with trial.random(number):
        model = convolutions(s.channels, ours.BatchNorm2d)
    trial.train(model, images, Sgd(s.steps, s.batch, s.rate), order=10 + number)
    return model


@torch.no_grad()
def matched(model: Any, other: Any, x: Tensor) -> Any:
    """``other`` with its channels in the order in which they correlate best with those of ``model``."""
    twin = copy.deepcopy(other)
    weighty, norms = layers(twin, (nn.Conv2d, nn.Linear)), layers(twin)
    for i, norm in enumerate(norms):
        ends = 3 * i + 3  # convolution, norm and ReLU of each layer
        a, b = (standard(outputs(m[:ends], x).movedim(1, -1).flatten(0, 2)) for m in (model, other))
        order = torch.from_numpy(assign(-(a.T @ b / len(a)).double().numpy()))
        weighty[i].weight.copy_(weighty[i].weight[order])
        weighty[i + 1].weight.copy_(weighty[i + 1].weight[:, order])
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.copy_(tensor[order].clone())
    return twin


def standard(x: Tensor) -> Tensor:
    """Columns of mean 0 and deviation 1; a channel that is never on stays 0."""
    return (x - x.mean(0)) / (x.std(0) + 1e-6)


def average(a: Any, b: Any, share: float) -> Any:
    """Weights and running statistics, ``share`` of them of ``b``."""
    mixed = copy.deepcopy(a)
    first, second = a.state_dict(), b.state_dict()
    mixed.load_state_dict(
        {
            name: torch.lerp(t, second[name], share) if t.is_floating_point() else t
            for name, t in first.items()
        }
    )
    return mixed


def run(s: Setting, trial: Trial) -> Measured:
    """Average two networks, matched or as they are, with averaged and with exact statistics."""
    images = trial.images(s.train, s.test, half=True)
    first, second = (trained(s, trial, images, number) for number in (1, 2))
    aligned = matched(first, second, images.x[:2000])
    loader = images.batches(500, 4000)
    curves: dict[str, list[float]] = {"before": [], "after": [], "unmatched": []}
    for share in _SHARES:
        mixed = average(first, aligned, share)
        curves["before"].append(wrong(mixed, images))
        if share == 0.5:
            collapse = collapses(mixed, (first, aligned), loader)
        curves["after"].append(wrong(recalibrate(mixed, loader), images))
        curves["unmatched"].append(wrong(recalibrate(average(first, second, share), loader), images))
    numbers = {"ends": (curves["before"][0] + curves["before"][-1]) / 2, "collapse": collapse[-1]}
    numbers["same"] = abs(curves["before"][-1] - wrong(second, images))
    for name, errors in curves.items():
        numbers[f"barrier_{name}"] = errors[_SHARES.index(0.5)] - (errors[0] + errors[-1]) / 2
    numbers["reduction"] = 100 * (1 - numbers["barrier_after"] / numbers["barrier_before"])
    return Measured(numbers, curves | {"collapse": collapse})


def collapses(mixed: Any, ends: tuple[Any, Any], loader: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Each batch norm's input variance in the average over the mean of that in the two networks."""
    variances = []
    for model in (mixed, *ends):
        exact = recalibrate(copy.deepcopy(model), loader, mode="in-order") if model is not mixed else model
        variances.append(input_variances(exact, loader[0][0]))
    return [m / ((a + b) / 2) for m, a, b in zip(*variances, strict=True)]


def input_variances(model: Any, x: Tensor) -> list[float]:
    """The mean over the channels of the variance of each batch norm's input, in evaluation."""
    return [outputs(model[: 3 * i + 1], x).var((0, 2, 3)).mean().item() for i in range(len(layers(model)))]


def wrong(model: nn.Module, images: Images) -> float:
    """Test error, %."""
    return 100 - accuracy(model, images.test_x, images.test_y)


def draw(figure: Figure, results: Results) -> None:
    """Errors between the networks, and the variances."""
    left, right = figure.subplots(1, 2)
    labels = {
        "unmatched": "as they are, exact statistics",
        "before": "matched, averaged statistics",
        "after": "matched, exact statistics",
    }
    for number, (name, label) in enumerate(labels.items()):
        line(left, _SHARES, results, name, (1, 4, 0)[number], marker="o", label=label)
    left.set(xlabel="share of the second network", ylabel="test error (%)", title="Between two networks")
    left.set_ylim(0, 1.4 * max(results.curve("unmatched")[2]))  # room for the legend
    left.legend(loc="upper right")
    depth = len(results.seeds[0].curves["collapse"])
    line(right, range(1, depth + 1), results, "collapse", 0, marker="o")
    right.set(
        xlabel="batch norm",
        ylabel="variance / that of the two",
        title="Variance in the average, before repair",
    )
    right.set_ylim(0, 1.1)


STUDY = Study(
    name="repair",
    title="Repairing a merged network",
    claim="An average of two networks whose units are matched fails because the variance of its activations "
    "collapses with depth; statistics measured anew take most of the barrier away.",
    paper="Jordan, Sedghi, Saukh, Entezari and Neyshabur 2023, “REPAIR: REnormalizing permuted activations "
    "for interpolation repair”",
    where="abstract and sections 3 and 4: variance collapse, and 60 to 100 % less of the barrier",
    tool="`gb.recalibrate`",
    method="Two networks of six convolutions with batch norm, trained on the same images from other weights "
    "in another order. Channels are matched layer by layer by the correlation of their activations on 2,000 "
    "images (a linear assignment). Weights and statistics are averaged; then the statistics are measured "
    "anew on 4,000 training images. The barrier is the error half-way less the mean of those at the ends.",
    differs="Six convolutions of 32 channels on images of 14 × 14; the paper has VGG and ResNet on CIFAR-10 "
    "and ImageNet. With batch norm the paper's repair is new statistics. Perceptrons, our first setting, "
    "have too small a barrier.",
    criteria=(
        Criterion(
            "new statistics take away at least 60 % of the barrier of the matched average",
            lambda n: n["barrier_before"] > 0 and n["reduction"] >= 60,
        ),
        Criterion(
            "before, the variance at the last batch norm is at most 0.7 of that in the two networks",
            lambda n: n["collapse"] <= 0.7,
        ),
        Criterion(
            "with new statistics, matched networks have less than half of the barrier of unmatched ones",
            lambda n: n["barrier_after"] < n["barrier_unmatched"] / 2,
        ),
        Criterion(
            "matching changes no output: the matched network errs as before, to 0.05 points",
            lambda n: n["same"] <= 0.05,
        ),
    ),
    numbers={
        "ends": "test error of the two networks, mean, %",
        "barrier_before": "barrier, matched, averaged statistics, points",
        "barrier_after": "barrier, matched, exact statistics, points",
        "barrier_unmatched": "barrier, as they are, exact statistics, points",
        "reduction": "how much of the barrier new statistics take away, %",
        "collapse": "variance at the last batch norm before, as a share",
        "same": "change of the second network's error by the matching, points",
    },
    setting=Setting(),
    quick=QUICK,
    run=run,
    draw=draw,
    data="clothing",
    believed="What is left is due to channels that do not match, and falls with the width, which is small "
    "here.",
)
