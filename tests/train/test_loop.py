from dataclasses import replace

import pytest
import torch
from torch import nn

from gammabeta.data import Dataset, Split
from gammabeta.errors import UsageError
from gammabeta.train import Recipe, TrainingInterrupted, build_network, fit, load_recipe
from gammabeta.train.batches import DeviceImages, Scaling
from gammabeta.train.evaluate import Evaluation
from gammabeta.train.fitting import Observer
from gammabeta.train.loop import Progress, Training
from gammabeta.train.run import hold_out

RECIPE = load_recipe("classic", {"batch_size": 32, "epochs": 2.0})


def make_training(digits: Dataset, seed: int = 0, recipe: Recipe = RECIPE) -> Training:
    data = DeviceImages(digits.train, Scaling.of(digits.train.images, "unit"), torch.device("cpu"))
    return Training(build_network(recipe, digits, seed), data, recipe, seed, "fp32")


def test_one_step_is_the_notebooks_step(digits: Dataset) -> None:
    training = make_training(digits)
    twin = build_network(RECIPE, digits, 0)
    index = training.order.indices(0)
    x = torch.from_numpy(digits.train.images)[index].float() / 255
    y = torch.from_numpy(digits.train.labels)[index]
    loss = nn.functional.cross_entropy(twin(x), y, reduction="sum")
    loss.backward()
    training.advance(1)
    for ours, theirs in zip(training.model.parameters(), twin.parameters(), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(ours, theirs - 0.001 * theirs.grad, rtol=1e-4, atol=1e-6)
    assert training.progress().loss == pytest.approx(float(loss.detach()) / 32, rel=1e-5)


def test_the_shown_loss_is_the_plain_one_and_counts_no_step_more_than_another(digits: Dataset) -> None:
    """Whatever is minimised: a mean of each step's cross-entropy, the newest with the notebook's weight."""
    smoothed = load_recipe("classic", {"batch_size": 32, "label_smoothing": 0.3, "class_weights": "balanced"})
    one, many = make_training(digits, recipe=smoothed), make_training(digits, recipe=smoothed)
    losses = []
    for _ in range(5):
        one.advance(1)
        _, logits, labels, _ = one._unread[-1]
        losses.append(float(nn.functional.cross_entropy(logits, labels)))
        one.progress()
    many.advance(5)
    shares = [0.99 ** (4 - step) for step in range(5)]
    average = sum(share * loss for share, loss in zip(shares, losses, strict=True)) / sum(shares)
    assert many.progress().loss == pytest.approx(average, rel=1e-6)
    assert one.progress() == many.progress()


def test_same_seed_same_weights_bitwise(digits: Dataset) -> None:
    weights = []
    for seed in (3, 3, 4):
        training = make_training(digits, seed)
        training.advance(7)
        weights.append(torch.cat([p.detach().flatten() for p in training.model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


class Watcher(Observer):
    def __init__(self, stop_after: int = 10**9) -> None:
        self.seen: list[Progress] = []
        self.judged: list[tuple[int, str]] = []
        self._stop_after = stop_after

    def progressed(self, progress: Progress, seconds: float) -> None:
        assert seconds >= 0
        self.seen.append(progress)

    def evaluated(self, epoch: int, split: str, result: Evaluation, seconds: float) -> None:
        self.judged.append((epoch, split))

    def stop_requested(self) -> bool:
        return self.seen[-1].step >= self._stop_after


def test_fit_learns_and_tells(digits: Dataset) -> None:
    watcher = Watcher()
    recipe = load_recipe("fast", {"epochs": 4.0, "batch_size": 64, "recalibrate": 256, "precision": "fp32"})
    outcome = fit(build_network(recipe, digits, 0), digits, recipe, device="cpu", observer=watcher)
    assert outcome.test.accuracy > 0.8
    assert watcher.seen[-1].step == outcome.progress.step == 40
    assert watcher.judged == [(3, "train"), (3, "test")]
    assert {"prepare", "compile", "train", "first_step", "watch", "recalibrate", "evaluate"} == set(
        outcome.seconds
    )
    assert 0 < outcome.seconds["first_step"] < outcome.seconds["train"]


def test_classic_judges_after_every_epoch(digits: Dataset) -> None:
    watcher = Watcher()
    fit(build_network(RECIPE, digits, 0), digits, RECIPE, device="cpu", observer=watcher)
    assert watcher.judged == [(0, "train"), (0, "test"), (1, "train"), (1, "test")]


def test_a_wish_to_stop_is_granted_after_the_step(digits: Dataset) -> None:
    with pytest.raises(TrainingInterrupted) as caught:
        fit(build_network(RECIPE, digits, 0), digits, RECIPE, device="cpu", observer=Watcher(stop_after=1))
    assert caught.value.progress.step < 40


def test_any_network_can_be_trained(digits: Dataset) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 144, 10)
    )
    recipe = load_recipe("fast", {"epochs": 5.0, "batch_size": 64, "recalibrate": 256, "precision": "fp32"})
    assert fit(model, digits, recipe, device="cpu").test.accuracy > 0.7


def test_the_twin_without_batch_norm_trains(digits: Dataset) -> None:
    recipe = load_recipe(
        "fast", {"batch_norm": False, "epochs": 1.0, "precision": "fp32", "learning_rate": 0.01}
    )
    outcome = fit(build_network(recipe, digits, 0), digits, recipe, device="cpu")
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in outcome.model.modules())


def test_fewer_than_two_images_are_refused(digits: Dataset) -> None:
    one = Dataset("one", Split(digits.train.images[:1], digits.train.labels[:1]), digits.test, digits.classes)
    with pytest.raises(UsageError, match="fewer than two"):
        fit(build_network(RECIPE, digits, 0), one, RECIPE, device="cpu")


def test_holding_out_splits_the_training_images(digits: Dataset) -> None:
    held = hold_out(digits, 100)
    assert len(held.train.labels) == 540
    assert held.test.labels.tolist() == digits.train.labels[-100:].tolist()
    with pytest.raises(UsageError):
        hold_out(digits, 640)


def test_thousands_of_short_epochs_are_reported(digits: Dataset, monkeypatch) -> None:
    def counted(training: Training) -> None:
        training.step, training.judged = training.step + 1, False

    monkeypatch.setattr(Training, "_take_step", counted)
    few = replace(digits, train=Split(digits.train.images[:64], digits.train.labels[:64]))
    recipe = load_recipe("fast", {"batch_size": 64, "epochs": 1200.0, "evaluate": "end", "recalibrate": 0})
    outcome = fit(build_network(recipe, few, 0), few, recipe, device="cpu", watch_points=0)
    assert outcome.progress.step == 1200
