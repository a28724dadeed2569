"""One run, one accuracy: whatever command or file tells it, in whichever precision it trained."""

import json

import numpy as np
import pytest

from gammabeta import data
from gammabeta.data.onnxfile import OnnxClassifier
from gammabeta.train import Run
from gammabeta.train.run import incomparable


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_everything_finds_one_accuracy(gammabeta, digits_file, tmp_path, precision):
    run = tmp_path / "run"
    settings = ["--recipe", "fast", "--epochs", "2.6", "--precision", precision, "--out", run]
    code, out, err = gammabeta("train", digits_file, "-r", "fast", *settings)
    assert code == 0, err
    result = Run.open(run).info.result
    accuracy = result["test_accuracy"]
    assert 0.3 < accuracy < 1
    assert f"After 2.6 epochs. Loss: {result['loss']:.4f}, " in out  # 13 steps
    assert f"Test_acc {accuracy:.5g}\n" in out
    assert f"Trained for 2.6 epochs ({result['images']:,} images)" in out

    for split in ("test", "train"):
        judged = json.loads(gammabeta("evaluate", run, "--split", split, "--json").out)
        assert judged["accuracy"] == result[f"{split}_accuracy"]
        assert judged["correct"] == round(judged["accuracy"] * judged["count"])
    assert judged["loss"] == pytest.approx(
        [row["loss"] for row in Run.open(run).metrics() if row.get("split") == "train"][-1], rel=1e-5
    )
    assert f"accuracy {accuracy:.5g} (" in gammabeta("evaluate", run).out
    rows = [row for row in Run.open(run).metrics() if row["kind"] == "evaluation" and row["split"] == "test"]
    assert rows[-1]["accuracy"] == accuracy
    compared = json.loads(gammabeta("compare", run, run, "--out", tmp_path / "c.png", "--json").out)
    assert [row["test_accuracy"] for row in compared["runs"]] == [accuracy] * 2
    assert compared["notes"] == []

    assert gammabeta("export", run, "--out", tmp_path / "m.onnx").code == 0
    test = data.load(digits_file).test
    answers = OnnxClassifier.open(tmp_path / "m.onnx").probabilities(test.images).argmax(1)
    assert np.mean(answers == test.labels) == accuracy


def test_compare_says_what_cannot_be_compared(gammabeta, digits_file, tmp_path):
    quick = ["--recipe", "fast", "--epochs", "0.4", "--quiet", "--out"]
    for name, more in (("a", []), ("b", ["--set", "shift=0"]), ("c", ["--holdout", "100"])):
        assert gammabeta("train", digits_file, "-r", "fast", *quick, tmp_path / name, *more).code == 0
    some = ["--set", "evaluate_train=100", "--out", tmp_path / "some", "--epochs", "0.4"]
    out = gammabeta("train", digits_file, "-r", "fast", *some).out
    result = Run.open(tmp_path / "some").info.result
    assert result["train_judged"] == 100
    assert f"Train_acc {result['train_accuracy']:.5f} of 100 images, " in out
    _, out, err = gammabeta("compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "p.png")
    assert "test loss" in out
    assert "augmented differently" in err
    assert "other images" not in err
    assert (
        "other images" in gammabeta("compare", tmp_path / "a", tmp_path / "c", "-o", tmp_path / "p.png").err
    )

    path = tmp_path / "b" / "run.json"
    document = json.loads(path.read_text("utf-8"))
    del document["loss"]  # as earlier versions wrote it
    path.write_text(json.dumps(document), "utf-8")
    told = incomparable([Run.open(tmp_path / "a"), Run.open(tmp_path / "b")])
    assert any("smoothed, as earlier versions had it" in line for line in told)
