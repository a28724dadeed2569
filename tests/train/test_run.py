import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gammabeta.data import Dataset
from gammabeta.errors import GammabetaWarning, RunError, WeightsError
from gammabeta.files import load_weights, write_atomically
from gammabeta.train import DigitNetwork, Run, TrainingInterrupted, load_model, load_recipe
from gammabeta.train.fitting import Observer
from gammabeta.train.run import Job
from gammabeta.train.session import train_run

RECIPE = load_recipe("classic", {"epochs": 0.3})


def train(digits: Dataset, path: Path, observer: Observer | None = None) -> Run:
    run, _ = train_run(digits, Job("mnist", RECIPE, device="cpu"), path, observer or Observer())
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> Path:
    return train(digits, tmp_path_factory.mktemp("runs") / "run").path


@pytest.fixture
def run_copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_run_folder_says_everything(finished: Path) -> None:
    assert {file.name for file in finished.iterdir()} - {".lock"} == {
        "run.json", "run.html", "recipe.toml", "metrics.jsonl", "model.safetensors",
        "checkpoints",
    }  # fmt: skip
    run = Run.open(finished)
    assert run.info.status == "finished"
    assert run.recipe == RECIPE
    assert run.info.result is not None
    assert run.info.result["steps"] == 3
    assert {"versions", "machine", "command", "commit"} <= set(run.info.provenance)
    assert "torch" in run.info.provenance["versions"]
    rows = run.metrics()
    assert [row["split"] for row in rows if row["kind"] == "evaluation"] == ["train", "test"]
    assert rows[0]["kind"] == "progress"


def test_the_loaded_network_is_the_trained_one(finished: Path, digits: Dataset) -> None:
    trained = load_model(finished, "cpu")
    result = trained.evaluate(digits.test)
    run = Run.open(finished)
    assert run.info.result is not None
    assert result.accuracy == run.info.result["test_accuracy"]
    probabilities = trained.probabilities(digits.test.images[:5])
    assert probabilities.shape == (5, 10)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(5))


class StopAtOnce(Observer):
    def stop_requested(self) -> bool:
        return True


class Fail(Observer):
    def evaluated(self, *_: Any) -> None:
        raise ZeroDivisionError


def test_an_interrupted_run_says_so_and_is_readable(digits: Dataset, tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted):
        train(digits, tmp_path / "run", StopAtOnce())
    assert Run.open(tmp_path / "run").info.status == "interrupted"
    assert load_model(tmp_path / "run", "cpu").evaluate(digits.test).count == 200
    assert (tmp_path / "run" / "run.html").exists()


def test_a_failed_run_says_so(digits: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        train(digits, tmp_path / "run", Fail())
    assert Run.open(tmp_path / "run").info.status == "failed"


def test_a_folder_with_something_in_it_is_not_taken(digits: Dataset, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious", "utf-8")
    with pytest.raises(RunError, match="there already"):
        train(digits, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_file_in_the_way_is_left_alone(digits: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious", "utf-8")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunError):
            train(digits, path)
    assert (tmp_path / "file").read_text("utf-8") == "precious"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "damaged"),
        (b'{"format": 0}', "damaged"),
        (b'{"format": 2}', "later version"),
    ],
)
def test_damaged_documents_are_refused(run_copy: Path, content: bytes, words: str) -> None:
    (run_copy / "run.json").write_bytes(content)
    with pytest.raises(RunError, match=words) as caught:
        Run.open(run_copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["run.json", "recipe.toml"])
def test_missing_documents_are_named(run_copy: Path, missing: str) -> None:
    (run_copy / missing).unlink()
    with pytest.raises(RunError, match=missing):
        Run.open(run_copy)


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run folder"):
        Run.open(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"not a run folder: it holds no run\.json"):
        Run.open(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 100, 5000])
def test_truncated_weights_are_refused(run_copy: Path, kept: int) -> None:
    weights = run_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        load_model(run_copy, "cpu")


def test_missing_weights_are_refused(run_copy: Path) -> None:
    (run_copy / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="no weights file"):
        load_model(run_copy, "cpu")


def test_weights_of_another_network_are_refused(run_copy: Path) -> None:
    document = json.loads((run_copy / "run.json").read_text("utf-8"))
    document["network"]["classes"].append("ten")
    (run_copy / "run.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(WeightsError, match=r"fc2\.weight is \(10, 128\) where \(11, 128\) is wanted"):
        load_model(run_copy, "cpu")


def test_a_line_cut_short_by_a_crash_is_left_out(run_copy: Path) -> None:
    metrics = run_copy / "metrics.jsonl"
    whole = Run.open(run_copy).metrics()
    metrics.write_bytes(metrics.read_bytes()[:-5])
    assert Run.open(run_copy).metrics() == whole[:-1]
    metrics.write_bytes(b"{broken\n" + metrics.read_bytes())
    with pytest.warns(GammabetaWarning, match="1 of"):
        assert Run.open(run_copy).metrics() == whole[:-1]


def test_two_processes_cannot_write_one_run(digits: Dataset, tmp_path: Path) -> None:
    class Second(Observer):
        refused = 0

        def progressed(self, *_: Any) -> None:
            try:
                train(digits, tmp_path / "run")
            except RunError:
                self.refused += 1

    second = Second()
    train(digits, tmp_path / "run", second)
    assert second.refused >= 1


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gammabeta.files.os.fsync", full)
    with pytest.raises(RunError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_weights_carry_what_it_takes_to_build_the_network(finished: Path) -> None:
    tensors, metadata = load_weights(finished / "model.safetensors")
    assert set(tensors) == set(DigitNetwork().state_dict())
    assert json.loads(metadata["gammabeta"])["classes"] == list("0123456789")


def test_a_huge_network_in_a_forged_run_is_refused_before_it_is_allocated(run_copy: Path) -> None:
    document = json.loads((run_copy / "run.json").read_text("utf-8"))
    document["network"] |= {"height": 16_000, "width": 16_000, "preparation": None}  # 400 GB of weights
    (run_copy / "run.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(WeightsError, match=r"fc1\.weight"):
        load_model(run_copy, "cpu")


@pytest.mark.parametrize(
    "changed",
    [
        {"height": 9},
        {"channels": 3, "like": None},
        {"style": "upside down"},
        {"like": {"mean": []}},
        {"box": "x"},
        {"height": "28"},
        {"channels": True},
        {"box": "0.7"},
        {"full": "255"},
    ],
)
def test_a_damaged_preparation_is_refused(run_copy: Path, changed: dict[str, Any]) -> None:
    document = json.loads((run_copy / "run.json").read_text("utf-8"))
    document["network"]["preparation"] |= changed
    (run_copy / "run.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(RunError, match=r"run\.json is damaged: .*preparation") as caught:
        Run.open(run_copy)
    assert "\n" not in str(caught.value)


def test_a_preparation_of_a_later_version_is_told(run_copy: Path) -> None:
    document = json.loads((run_copy / "run.json").read_text("utf-8"))
    document["network"]["preparation"]["sharpen"] = True
    (run_copy / "run.json").write_text(json.dumps(document), "utf-8")
    with pytest.warns(GammabetaWarning, match=r"does not know and ignores: sharpen"):
        Run.open(run_copy)


def test_what_the_guard_notices_is_told_and_recorded(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "watched_nets.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8, momentum=0.99),"
        " nn.Linear(8, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    heard = []

    class Guarded(Observer):
        guards = True

        def noticed(self, noticed: Any) -> None:
            heard.append(noticed)

    job = Job("mnist", RECIPE, device="cpu", model="watched_nets:make")
    run, _ = train_run(digits, job, tmp_path / "run", Guarded())
    assert [(one.step, one.finding.check) for one in heard] == [(1, "momentum")]
    rows = [row for row in run.metrics() if row["kind"] == "guard"]
    assert [(row["step"], row["check"], row["layers"]) for row in rows] == [(1, "momentum", ["2"])]
