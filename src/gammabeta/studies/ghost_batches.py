"""Hoffer et al. 2017, table 1: what a large batch costs, and what ghost batches and more steps give back."""

from dataclasses import dataclass, replace

from matplotlib.figure import Figure
from torch import nn

import gammabeta.nn as ours

from .networks import perceptron
from .pictures import bars
from .study import Criterion, Measured, Results, Study
from .trial import Sgd, Trial, accuracy


@dataclass(frozen=True)
class Setting:
    """The large batch is 16 small ones; all but the last training see every image ``epochs`` times."""

    train: int = 8000
    test: int = 10_000
    width: int = 128
    small: int = 32
    large: int = 512
    epochs: int = 10
    rate: float = 0.05


QUICK = Setting(train=1024, test=500, width=16, epochs=1)


def run(s: Setting, trial: Trial) -> Measured:
    """The five columns of the table."""
    images = trial.images(s.train, s.test, half=True)
    plain = Sgd(s.epochs * (s.train // s.small), s.small, s.rate)
    large = replace(plain, steps=s.epochs * (s.train // s.large), batch=s.large)
    rooted = replace(large, rate=s.rate * (s.large / s.small) ** 0.5)
    numbers = {}
    for name, sgd, ghosts in (
        ("small", plain, False),
        ("large", large, False),
        ("rooted", rooted, False),
        ("ghost", rooted, True),
        ("longer", replace(rooted, steps=plain.steps), True),
    ):

        def norm(width: int, ghosts: bool = ghosts) -> nn.Module:
            return (
                ours.GhostBatchNorm1d(width, virtual_batch_size=s.small)
                if ghosts
                else ours.BatchNorm1d(width)
            )

        with trial.random():
            model = perceptron((14 * 14, *[s.width] * 4, 10), norm)
        trial.train(model, images, sgd)
        numbers[name] = accuracy(model, images.test_x, images.test_y)
    return Measured(numbers)


def draw(figure: Figure, results: Results) -> None:
    """The table as points."""
    axes = figure.subplots()
    names = (
        "small batch\n32",
        "large batch\n512",
        "and the rate\n× 4",
        "and ghosts\nof 32",
        "and as many\nsteps as small",
    )
    bars(axes, names, results, ("small", "large", "rooted", "ghost", "longer"))
    axes.axhline(results.spread("small").mean, color="gray", linestyle=":", linewidth=1)
    axes.set(ylabel="test accuracy (%)")


STUDY = Study(
    name="ghost-batches",
    title="Ghost batches",
    claim="A large batch generalises worse than a small one at the same number of epochs; a rate larger by "
    "the root of the ratio and ghost batch norm give some of it back, and as many steps as the small batch "
    "has give back the rest.",
    paper="Hoffer, Hubara and Soudry 2017, “Train longer, generalize better: closing the generalization gap "
    "in large batch training of neural networks”",
    where="section 4 and table 1, the row of MNIST",
    tool="`gb.nn.GhostBatchNorm1d(virtual_batch_size=32)`",
    method="A perceptron of four hidden layers of 128 on digits of 14 × 14, ten epochs with batches of 32; "
    "then with 512, with the rate times √16, with ghost batches of 32, and with as many steps as the small "
    "batch. SGD with momentum 0.9, the rate falls evenly to zero.",
    differs="8,000 images, and batches of 32 and 512 where the paper has 128 and 4,096; its row of MNIST has "
    "a wider perceptron.",
    criteria=(
        Criterion(
            "the large batch is less accurate than the small one by at least 0.2 points",
            lambda n: n["large"] <= n["small"] - 0.2,
        ),
        Criterion(
            "with the larger rate and ghosts the large batch is more accurate than without",
            lambda n: n["ghost"] > n["large"],
        ),
        Criterion(
            "with as many steps too it is at most 0.1 points below the small batch",
            lambda n: n["longer"] >= n["small"] - 0.1,
        ),
    ),
    numbers={
        "small": "test accuracy, small batch, %",
        "large": "large batch, %",
        "rooted": "large batch, rate × 4, %",
        "ghost": "large batch, rate × 4, ghosts of 32, %",
        "longer": "the same with as many steps as the small batch, %",
    },
    setting=Setting(),
    quick=QUICK,
    run=run,
    draw=draw,
)
