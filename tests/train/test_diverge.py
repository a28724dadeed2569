"""A loss that is no longer a number ends the training when it happens, and what was good is kept."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from gammabeta.data import Dataset
from gammabeta.errors import DivergedError
from gammabeta.jsontext import from_json, to_json
from gammabeta.train import Run, fit, load_model, load_recipe
from gammabeta.train.fitting import Observer
from gammabeta.train.loop import Progress, Training
from gammabeta.train.page import _layers
from gammabeta.train.run import Job
from gammabeta.train.session import train_run

SETTINGS = {"epochs": 3.0, "batch_size": 32, "precision": "fp32", "recalibrate": 128, "warmup": 0.0}
TWIN = load_recipe("fast", SETTINGS | {"batch_norm": False, "learning_rate": 1e4})
WITH = load_recipe("fast", SETTINGS | {"learning_rate": 1e6, "weight_decay": 1e4})


class Seen(Observer):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def progressed(self, progress: Progress, seconds: float) -> None:
        self.losses.append(progress.loss)


@pytest.mark.parametrize("recipe", [TWIN, WITH], ids=["without", "with"])
def test_a_divergence_is_noticed_when_it_happens(digits: Dataset, tmp_path: Path, recipe) -> None:
    seen = Seen()
    with pytest.raises(DivergedError) as caught:
        train_run(digits, Job("digits", recipe, device="cpu"), tmp_path / "run", seen)
    message = str(caught.value)
    assert "the training diverged: the loss of step " in message
    assert "at a learning rate of 9.58e+0" in message
    assert "\n" not in message
    assert all(map(math.isfinite, seen.losses))
    run = Run.open(tmp_path / "run")
    assert (run.info.status, run.info.failure, run.info.result) == ("failed", message, None)
    assert f" are in {run.path / 'model.safetensors'}" in message
    assert "weights after step 1 are" in message or "weights after step 2 are" in message
    weights = load_model(run.path, "cpu").model.state_dict()
    assert all(tensor.isfinite().all() for tensor in weights.values())
    for line in (run.path / "metrics.jsonl").read_text("utf-8").splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))


def test_statistics_that_are_no_numbers_are_drawn_as_gaps() -> None:
    nothing = dict.fromkeys(("mean", "var", "mean_distance", "var_distance")) | {"percentiles": [None] * 3}
    rows = [{"kind": "statistics", "step": 1, "epochs": 0.1, "layers": {"bn1": nothing}}]
    assert _layers(rows) == [{"name": "bn1", "charts": []}]


def test_a_later_step_keeps_the_weights_before_it(digits: Dataset, tmp_path: Path, monkeypatch) -> None:
    take = Training._take_step

    def spoil(training: Training) -> None:
        if training.step == 25:
            with torch.no_grad():
                training.model.fc2.bias.fill_(float("nan"))
        take(training)

    monkeypatch.setattr(Training, "_take_step", spoil)
    recipe = TWIN.model_copy(update={"learning_rate": 0.01})
    with pytest.raises(
        DivergedError, match=r"loss of step 26 \(epoch 1\) is not finite.*learning rate of 0\.0"
    ):
        train_run(digits, Job("digits", recipe, device="cpu"), tmp_path / "run", Observer())
    assert load_model(tmp_path / "run", "cpu").evaluate(digits.test).accuracy > 0.2


def test_weights_that_the_last_step_spoilt(digits: Dataset, monkeypatch) -> None:
    take = Training._take_step

    def spoil(training: Training) -> None:
        take(training)
        if training.step == training.steps:
            with torch.no_grad():
                training.model.fc2.bias.fill_(float("inf"))

    monkeypatch.setattr(Training, "_take_step", spoil)
    network = nn.Sequential()
    network.add_module("flat", nn.Flatten())
    network.add_module("fc2", nn.Linear(784, 10))
    recipe = TWIN.model_copy(update={"learning_rate": 0.01, "epochs": 0.2})
    with pytest.raises(DivergedError, match="the result of step 4 "):
        fit(network, digits, recipe, device="cpu")


def test_an_overflow_after_the_last_step(digits: Dataset, monkeypatch) -> None:
    take = Training._take_step

    def spoil(training: Training) -> None:
        take(training)
        if training.step == training.steps:
            with torch.no_grad():
                training.model.stem.weight.fill_(1e38)

    monkeypatch.setattr(Training, "_take_step", spoil)
    network = nn.Sequential()
    network.add_module("stem", nn.Conv2d(1, 4, 28, bias=False))
    network.add_module("norm", nn.BatchNorm2d(4))
    network.add_module("flat", nn.Flatten())
    network.add_module("fc2", nn.Linear(4, 10))
    recipe = WITH.model_copy(update={"learning_rate": 0.01, "weight_decay": 0.0, "epochs": 0.2})
    with pytest.raises(DivergedError, match="the output of step 4 "):
        fit(network, digits, recipe, device="cpu")


def test_json_has_no_nan() -> None:
    text = to_json({"a": [float("nan"), 1.5, {"b": -float("inf")}], "c": (float("inf"),)})
    assert from_json(text) == {"a": [None, 1.5, {"b": None}], "c": [None]}
    for text in ("[" * 60 + "]" * 60, "[" * 100_000, "{", "9" * 5000):
        with pytest.raises(ValueError, match=r"nested|Expecting|digits"):
            from_json(text)


def test_weights_that_cannot_be_judged_are_not_the_good_ones(digits: Dataset, tmp_path: Path) -> None:
    recipe = TWIN.model_copy(update={"epochs": 0.1})  # two steps: finite, but an evaluation overflows
    words = r"the evaluation of step 2 .* the weights after step 1 are in"
    with pytest.raises(DivergedError, match=words):
        train_run(digits, Job("digits", recipe, device="cpu"), tmp_path / "run", Observer())
