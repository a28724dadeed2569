"""A run folder that version 0.1.0 left behind: it is judged, predicts and goes on as it did then.

``run-0.1.0`` was written by ``gammabeta train digits.npz --out run-0.1.0 --device cpu --precision fp32
--epochs 6 -s evaluate=epoch -s batch_size=50`` of 0.1.0; the pictures and the older checkpoint were deleted.
``digits.npz`` holds the middle 16×16 pixels of 400 training and 100 test digits of MNIST. ``expected.json``
is what ``gammabeta evaluate`` and ``gammabeta predict seven.png --style plain`` of 0.1.0 printed.
``model.onnx`` is what its ``gammabeta export`` wrote.
"""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch

from gammabeta.cli.app import run as command_line
from gammabeta.data import load
from gammabeta.files import load_weights
from gammabeta.train import Recipe, Run, load_model
from gammabeta.train.documents import NetworkInfo, RunInfo
from gammabeta.train.recipe import BEFORE

RECORDED = Path(__file__).parent / "run-0.1.0"
EXPECTED = json.loads((RECORDED / "expected.json").read_text("utf-8"))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the run to where its data are found under the name that it gives."""
    shutil.copytree(RECORDED, tmp_path / "run")
    shutil.copy(RECORDED / "digits.npz", tmp_path)
    monkeypatch.chdir(tmp_path)
    return Path("run")


@pytest.mark.parametrize(("best", "key"), [(False, "evaluate"), (True, "evaluate_best")])
def test_it_is_judged_as_it_was(run: Path, best: bool, key: str) -> None:
    trained, expected = load_model(run, "cpu", best=best), EXPECTED[key]
    found = trained.evaluate(load("digits.npz").test)
    assert (found.correct, found.count) == (expected["correct"], expected["count"])
    assert found.confusion.tolist() == expected["confusion"]
    assert found.loss == pytest.approx(expected["loss"], rel=1e-4)


def test_its_documents_are_read(run: Path) -> None:
    opened = Run.open(run)
    assert opened.info.result is not None
    assert opened.info.result["test_accuracy"] == EXPECTED["evaluate"]["accuracy"]
    assert opened.info.provenance["versions"]["gammabeta"] == "0.1.0"
    assert (opened.recipe.epochs, opened.recipe.batch_size) == (6, 50)
    kinds = {row["kind"] for row in opened.metrics()}
    assert kinds == {"progress", "evaluation", "statistics"}


@pytest.mark.parametrize("model", ["", "model.onnx"])
def test_it_predicts_what_it_predicted(run: Path, capsys: pytest.CaptureFixture[str], model: str) -> None:
    picture = str(RECORDED / "seven.png")
    arguments = [
        "predict",
        str(run / model),
        picture,
        "--style",
        "plain",
        "--top",
        "10",
        "--device",
        "cpu",
        "--json",
    ]
    assert command_line(arguments) == 0
    (answer,) = json.loads(capsys.readouterr().out)["predictions"]
    found = {guess["class"]: guess["probability"] for guess in answer["predictions"]}
    assert found == pytest.approx(EXPECTED["predict"], abs=1e-4)


def test_it_goes_on_from_its_checkpoint_to_the_weights_it_had(run: Path) -> None:
    finished = Run.open(run).info.result
    document = json.loads((run / "run.json").read_text("utf-8"))
    document |= {"status": "running", "finished": None, "result": None}  # as if killed in the last epoch
    (run / "run.json").write_text(json.dumps(document), "utf-8")
    wanted, _ = load_weights(run / "model.safetensors")
    (run / "model.safetensors").unlink()
    assert command_line(["train", "--resume", str(run), "--device", "cpu", "--quiet"]) == 0
    found, _ = load_weights(run / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():  # not to the bit: another machine or number of threads
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-3, msg=name)
    result = Run.open(run).info.result
    assert finished is not None
    assert result is not None
    assert (result["steps"], result["images"]) == (finished["steps"], finished["images"])
    assert result["test_loss"] == pytest.approx(finished["test_loss"], rel=1e-2)
    steps = [row["step"] for row in Run.open(run).metrics() if row["kind"] == "progress"]
    assert steps == sorted(set(steps))


def test_it_gets_more_epochs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--resume", str(run), "--epochs", "8", "--device", "cpu"]
    assert command_line(arguments) == 0
    assert "from its weights, with no momentum yet" in capsys.readouterr().out
    opened = Run.open(run)
    assert opened.info.result is not None
    assert (opened.info.result["steps"], opened.recipe.epochs) == (64, 8)
    assert opened.info.result["test_accuracy"] > 0.8


def test_it_prepares_pictures_as_before_when_data_with_a_name_are_moved(run: Path) -> None:
    document = json.loads((run / "run.json").read_text("utf-8"))
    document["data"] = "mnist"
    (run / "run.json").write_text(json.dumps(document), "utf-8")
    opened = Run.open(run)
    assert opened.preparation.style == "digit"
    for place in ("digits.npz", "digits.npz"):  # moved twice
        opened.move_data(place)
    assert Run.open(run).preparation == opened.preparation
    assert (opened.preparation.style, opened.info.data) == ("digit", "digits.npz")


def test_a_training_of_today_begins_with_its_weights(run: Path) -> None:
    arguments = ["train", "digits.npz", "--out", "warm", "--init", str(run), "--precision", "fp32"]
    assert command_line([*arguments, "--epochs", "1", "--quiet"]) == 0
    assert Run.open("warm").info.init is not None


def test_every_field_that_came_later_says_what_was_done_before() -> None:
    recorded = tomllib.loads((RECORDED / "recipe.toml").read_text("utf-8"))
    assert Recipe.model_fields.keys() - recorded.keys() == BEFORE.keys()
    document = json.loads((RECORDED / "run.json").read_text("utf-8"))
    assert set(document) <= set(RunInfo.model_fields)
    assert not [
        name for name, field in RunInfo.model_fields.items() if field.is_required() and name not in document
    ]
    assert not [
        name
        for name, field in NetworkInfo.model_fields.items()
        if field.is_required() and name not in document["network"]
    ]
