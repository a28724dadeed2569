"""The settings of a recipe beyond plain gradient descent, each against its definition."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gammabeta.data import Dataset, Split
from gammabeta.errors import UsageError
from gammabeta.train import build_network, fit, load_recipe
from gammabeta.train.batches import DeviceImages, Scaling
from gammabeta.train.fitting import Observer
from gammabeta.train.loop import Training, learning_rate, momentum
from gammabeta.train.objective import Objective
from gammabeta.train.optimizers import AdamW, Average

SMALL = {"batch_size": 64, "precision": "fp32", "recalibrate": 128}


def training_of(digits: Dataset, **settings: object) -> Training:
    recipe = load_recipe("fast", {**SMALL, "epochs": 1.0, **settings})
    data = DeviceImages.to_train_on(digits.train, Scaling((0.0,), (1 / 255,)), torch.device("cpu"), recipe)
    return Training(build_network(recipe, digits, 0), data, recipe, 0, "fp32")


def weights_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_adamw_takes_the_steps_of_torchs_bit_for_bit() -> None:
    recipe = load_recipe("pictures", {"weight_decay": 0.1})
    ours = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 5))
    theirs = copy.deepcopy(ours)
    groups = [
        {"params": [p for p in theirs.parameters() if (p.dim() > 1) == wide], "weight_decay": decay}
        for wide, decay in ((True, 0.1), (False, 0.0))
    ]
    betas = (recipe.momentum, recipe.second_momentum)
    theirs_optimizer = torch.optim.AdamW(groups, betas=betas, fused=True)
    optimizer = AdamW(ours, recipe)
    for step in range(4):
        x, upstream = torch.randn(6, 2, 5, 5), torch.randn(6, 5)
        for model in (ours, theirs):
            (model(x) * upstream).sum().backward()
        for group in theirs_optimizer.param_groups:
            group["lr"] = 0.01 / (step + 1)
        theirs_optimizer.step()
        optimizer.step(0.01 / (step + 1))
        theirs_optimizer.zero_grad()
        optimizer.zero_grad()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "settings", [{"optimizer": "adamw", "average": "ema"}, {"average": "swa", "mixup_alpha": 0.5}]
)
def test_a_state_goes_on_bit_for_bit(digits: Dataset, settings: dict[str, object]) -> None:
    whole, parted = (training_of(digits, average_from=0.2, **settings) for _ in range(2))
    whole.advance(8)
    parted.advance(4)
    again = training_of(digits, average_from=0.2, **settings)
    again.restore(parted.state())
    again.advance(4)
    assert torch.equal(weights_of(whole.model), weights_of(again.model))
    for training in (whole, again):
        training.average.give()
    assert torch.equal(weights_of(whole.model), weights_of(again.model))


def test_gradients_are_scaled_down_to_the_norm_that_is_set(digits: Dataset) -> None:
    free, bound = training_of(digits, learning_rate=0.1), training_of(digits, learning_rate=0.1, clip=1e-3)
    before = weights_of(free.model)
    for training in (free, bound):
        training.rate = lambda _: 1.0
        training.advance(1)
    # One step of Nesterov's momentum moves by 1 + μ gradients, and weight decay takes its share.
    moved = (weights_of(bound.model) - before).norm()
    assert moved < 1.9e-3 + 1.9 * 5e-4 * before.norm()
    assert (weights_of(free.model) - before).norm() > 10 * moved


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averages_are_what_their_papers_say(kind: str) -> None:
    model = nn.Linear(2, 1, bias=False)
    recipe = load_recipe("fast", {"average": kind, "average_from": 0.5, "average_weight": 0.25})
    average, seen = Average(model, recipe, 8), []
    for step in range(8):
        with torch.no_grad():
            model.weight.copy_(torch.randn(1, 2))
        average.update(step)
        seen.append(model.weight.detach().clone())
    expected = torch.stack(seen[4:]).mean(0)
    if kind == "ema":
        expected = seen[4]
        for weight in seen[5:]:
            expected = 0.75 * expected + 0.25 * weight
    average.give()
    torch.testing.assert_close(model.weight.detach(), expected)


def test_averaged_weights_need_statistics_of_their_own() -> None:
    with pytest.raises(UsageError, match="recipe fast: averaged weights need statistics"):
        load_recipe("fast", {"average": "ema", "recalibrate": 0})


def test_balanced_weights_let_every_class_count_alike() -> None:
    labels = torch.tensor([0] * 6 + [1] * 2 + [2] * 2)
    recipe = load_recipe("fast", {"class_weights": "balanced", "label_smoothing": 0.0})
    logits = torch.randn(10, 4)  # a class without images is left out of the count
    each = F.cross_entropy(logits, labels, reduction="none")
    expected = torch.stack([each[labels == label].mean() for label in range(3)]).mean()
    torch.testing.assert_close(Objective(recipe, labels, summed=False)(logits, labels), expected)
    torch.testing.assert_close(Objective(recipe, labels, summed=True)(logits, labels), 10 * expected)


def test_mixed_images_have_shares_of_both_labels() -> None:
    recipe = load_recipe("fast")
    y, other, logits = torch.tensor([0, 1]), torch.tensor([2, 1]), torch.randn(2, 3)
    target = 0.7 * F.one_hot(y, 3) + 0.3 * F.one_hot(other, 3)
    expected = F.cross_entropy(logits, target, label_smoothing=recipe.label_smoothing)
    torch.testing.assert_close(Objective(recipe, y, summed=False)(logits, y, other, 0.7), expected)


def test_one_cycle_rises_and_falls_and_momentum_goes_the_other_way() -> None:
    recipe = load_recipe("pictures", {"warmup": 0.25, "learning_rate": 1.0, "momentum": 0.95})
    rates = [learning_rate(recipe, step, 1000) for step in range(1000)]
    momenta = [momentum(recipe, step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 25, abs=1e-3)
    assert max(rates) == pytest.approx(1, abs=1e-4)
    assert rates.index(max(rates)) in (249, 250)
    assert rates[-1] < 1e-5
    assert all(later > earlier for earlier, later in itertools.pairwise(rates[:250]))
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[250:]))
    assert (momenta[0], momenta[-1]) == (pytest.approx(0.95, abs=1e-4), pytest.approx(0.95, abs=1e-4))
    assert min(momenta) == pytest.approx(0.85, abs=1e-4)
    assert momentum(load_recipe("fast"), 3, 10) == 0.9


class Judged(Observer):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def evaluated(self, epoch, split, result, seconds) -> None:
        if split == "test":
            self.losses.append(result.loss)


def test_patience_ends_a_training_that_no_longer_improves(digits: Dataset) -> None:
    """On images of noise held-out loss only rises once the training images are known by heart."""
    random = np.random.default_rng(0)
    splits = [
        Split(random.integers(0, 256, (64, 1, 28, 28), np.uint8), random.integers(0, 10, 64))
        for _ in range(2)
    ]
    noise = Dataset("noise", *splits, digits.classes)
    settings = {**SMALL, "epochs": 60.0, "patience": 3, "schedule": "constant", "learning_rate": 0.05}
    watcher, recipe = Judged(), load_recipe("fast", settings)
    outcome = fit(build_network(recipe, noise, 0), noise, recipe, device="cpu", observer=watcher)
    best = watcher.losses.index(min(watcher.losses[:-1]))
    assert outcome.progress.step == best + 1 + 3 < 60
    assert len(watcher.losses) == best + 1 + 3 + 1  # the last is of the recalibrated network
    assert math.isfinite(outcome.test.loss)
