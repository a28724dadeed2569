"""Trackers get the numbers of a training; a tracker that fails is left out, and the training goes on."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gammabeta import data, train
from gammabeta.errors import GammabetaWarning, UnavailableError, UsageError
from gammabeta.train import trackers
from gammabeta.train.fitting import Observer
from gammabeta.train.run import Job, Run
from gammabeta.train.session import train_run
from gammabeta.train.trackers import check_trackers, scalars


class Fake(ModuleType):
    """A package with the functions that wandb and trackio share."""

    def __init__(self, name: str, fails_at: int | None = None) -> None:
        super().__init__(name)
        self.started: dict[str, Any] = {}
        self.logged: list[tuple[dict[str, float], int]] = []
        self.finished, self._fails_at = 0, fails_at

    def init(self, **settings: Any) -> "Fake":
        self.started = settings
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        if len(self.logged) == self._fails_at:
            raise ConnectionError("no network")
        self.logged.append((numbers, step))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    def installed(fake: Fake) -> Fake:
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
        monkeypatch.setattr(trackers, "find_spec", lambda name: name in sys.modules or None)
        return fake

    return installed


def trained(tmp_path: Path, *track: str) -> Run:
    path = tmp_path / "two.npz"
    images = np.arange(40 * 256).reshape(40, 16, 16).astype(np.uint8)
    np.savez(path, x_train=images, y_train=np.arange(40) % 2, x_test=images[:8], y_test=np.arange(8) % 2)
    recipe = train.load_recipe("fast", {"epochs": 1, "batch_size": 20, "precision": "fp32"})
    return train_run(data.load(path), Job(str(path), recipe), tmp_path / "run", Observer(), track=track)[0]


def test_each_tracker_gets_every_record(tmp_path: Path, install: Any) -> None:
    fakes = [install(Fake(name)) for name in ("wandb", "trackio")]
    run = trained(tmp_path, "wandb", "trackio")
    rows = run.metrics()
    for fake in fakes:
        assert fake.started["name"] == "run"
        assert fake.started["config"]["batch_size"] == 20
        assert [step for _, step in fake.logged] == [row["step"] for row in rows]
        names = {name for numbers, _ in fake.logged for name in numbers}
        assert {"progress/loss", "evaluation/test/accuracy", "statistics/bn1/percentile_50"} <= names
        accuracy = [n["evaluation/test/accuracy"] for n, _ in fake.logged if "evaluation/test/accuracy" in n]
        assert accuracy == [row["accuracy"] for row in rows if row.get("split") == "test"]
        assert fake.finished == 1


def test_one_that_fails_is_told_once_and_left_out(tmp_path: Path, install: Any) -> None:
    fake = install(Fake("wandb", fails_at=1))
    with pytest.warns(
        GammabetaWarning, match="wandb gets no more numbers: ConnectionError: no network"
    ) as told:
        run = trained(tmp_path, "wandb")
    assert len(told) == 1
    assert run.info.status == "finished"
    assert len(fake.logged) == 1


def test_what_is_not_known_or_not_installed(install: Any) -> None:
    install(Fake("wandb"))
    assert check_trackers(["wandb", "wandb"]) == ["wandb"]
    with pytest.raises(UsageError, match="unknown tracker 'mlflow': choose from tensorboard, wandb, trackio"):
        check_trackers(["mlflow"])
    with pytest.raises(UnavailableError, match=r"trackio is not installed: .*\.\[trackio\]"):
        check_trackers(["trackio"])


def test_flags_and_missing_numbers_are_no_numbers() -> None:
    row = {"step": 3, "loss": None, "split": "test", "accuracy": 0.5}
    assert scalars("evaluation", row) == {"evaluation/test/accuracy": 0.5}
