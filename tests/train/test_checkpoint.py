from pathlib import Path

import pytest
import torch

from gammabeta.data import Dataset
from gammabeta.errors import DataError, RunError
from gammabeta.files import load_weights
from gammabeta.train import Run, TrainingInterrupted, load_model, load_recipe
from gammabeta.train.checkpoint import Checkpoints, State
from gammabeta.train.fitting import Observer
from gammabeta.train.loop import Progress
from gammabeta.train.run import Job
from gammabeta.train.session import resume_run, train_run

SETTINGS = {"epochs": 3.0, "batch_size": 64, "precision": "fp32", "recalibrate": 128, "shift": 1}
RECIPE = load_recipe("fast", SETTINGS | {"evaluate": "epoch"})


def state(step: int) -> State:
    values = {"step": step, "images": 9, "loss": 1.5, "accuracy": 0.5, "seconds": 0.1, "metrics_bytes": 0}
    return State({"model.w": torch.full((3,), float(step))}, values | {"note": "γ"})


def test_the_newest_two_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load() == (None, [])
    for step in (1, 5, 9):
        checkpoints.save(state(step))
    assert checkpoints.steps() == [5, 9]
    loaded, words = checkpoints.load()
    assert loaded is not None
    assert loaded.values.items() >= state(9).values.items()
    assert torch.equal(loaded.tensors["model.w"], torch.full((3,), 9.0))
    assert words == []
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4


@pytest.mark.parametrize("file", ["step-9.json", "step-9.safetensors"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "missing"])
def test_a_damaged_checkpoint_is_passed_over_with_a_word(tmp_path: Path, file: str, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(5))
    checkpoints.save(state(9))
    path = tmp_path / "checkpoints" / file
    content = path.read_bytes()
    middle = len(content) // 2
    damaged = {
        "truncate": content[:-3],
        "flip": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "empty": b"",
    }
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(damaged[damage])
    loaded, words = checkpoints.load()
    assert loaded is not None
    assert loaded.values["step"] == 5
    assert len(words) == (0 if (file, damage) == ("step-9.json", "missing") else 1)
    assert all("step 9 is damaged and passed over" in word for word in words)


def test_leftovers_of_a_killed_process_are_swept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(5))
    (tmp_path / "checkpoints" / "step-7.safetensors").write_bytes(b"half")
    checkpoints.save(state(9))
    assert not (tmp_path / "checkpoints" / "step-7.safetensors").exists()


class StopAt(Observer):
    def __init__(self, step: int) -> None:
        self._step, self._reached = step, 0

    def progressed(self, progress: Progress, seconds: float) -> None:
        self._reached = progress.step

    def stop_requested(self) -> bool:
        return self._reached >= self._step


def train(digits: Dataset, path: Path, stop: int = 10**9) -> Run:
    job = Job("digits", RECIPE, seed=5, device="cpu")
    run, _ = train_run(digits, job, path, StopAt(stop), checkpoint_every=0)
    return run


def test_resumed_is_bitwise_the_uninterrupted_run(digits: Dataset, tmp_path: Path) -> None:
    whole = train(digits, tmp_path / "whole")
    words: list[str] = []
    stops = [1, 4, 10, 17, 10**9]
    path = tmp_path / "parts"
    with pytest.raises(TrainingInterrupted):
        train(digits, path, stops[0])
    for stop in stops[1:-1]:
        with pytest.raises(TrainingInterrupted):
            resume_run(path, digits, StopAt(stop), tell=words.append, checkpoint_every=0)
    parts, _ = resume_run(path, digits, Observer(), tell=words.append)
    ours, theirs = (load_weights(run.path / "model.safetensors")[0] for run in (parts, whole))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert [word for word in words if "going on from step" in word]
    assert parts.info.status == "finished"
    assert parts.info.result is not None
    assert whole.info.result is not None
    assert parts.info.result["test_accuracy"] == whole.info.result["test_accuracy"]
    assert parts.info.result["loss"] == whole.info.result["loss"]


def test_resumed_metrics_have_no_gap_and_no_repetition(digits: Dataset, tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted):
        train(digits, tmp_path / "run", 12)
    run, _ = resume_run(tmp_path / "run", digits, Observer(), tell=lambda _: None)
    steps = [row["step"] for row in run.metrics() if row["kind"] == "progress"]
    assert steps == sorted(set(steps))
    assert steps[-1] == 30
    judged = [(row["epoch"], row["split"]) for row in run.metrics() if row["kind"] == "evaluation"]
    assert judged == [(epoch, split) for epoch in range(3) for split in ("train", "test")]


def test_killed_before_the_first_checkpoint_starts_over(digits: Dataset, tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted):
        train(digits, tmp_path / "run", 3)
    for file in (tmp_path / "run" / "checkpoints").iterdir():
        file.unlink()
    words: list[str] = []
    run, _ = resume_run(tmp_path / "run", digits, Observer(), tell=words.append)
    assert "no checkpoint yet" in words[-1]
    assert run.info.status == "finished"


def test_best_weights_are_those_of_the_best_epoch(digits: Dataset, tmp_path: Path) -> None:
    run = train(digits, tmp_path / "run")
    judged = [row for row in run.metrics() if row["kind"] == "evaluation" and row["split"] == "test"]
    best = min(judged, key=lambda row: row["loss"])
    assert load_model(run.path, "cpu", best=True).evaluate(digits.test).accuracy == best["accuracy"]


def test_what_cannot_be_resumed_is_refused(digits: Dataset, tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted):
        train(digits, tmp_path / "part", 1)
    run = train(digits, tmp_path / "run")
    with pytest.raises(RunError, match="is finished"):
        resume_run(run.path, digits, Observer(), tell=lambda _: None)
    with pytest.raises(RunError, match="no run folder"):
        resume_run(tmp_path / "nowhere", digits, Observer(), tell=lambda _: None)
    other = Dataset("other", digits.test, digits.test, digits.classes)
    with pytest.raises(DataError, match="has changed"):
        resume_run(tmp_path / "part", other, Observer(), tell=lambda _: None)
