"""``gammabeta fold``, ``export``, and ``predict`` on what was exported."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gammabeta import data


@pytest.fixture
def pictures(tmp_path):
    images = data.load("mnist").test.images[:4, 0]
    paths = [tmp_path / f"{i}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths


def test_fold_compares_every_test_image_and_writes_a_program(gammabeta, trained_run, tmp_path):
    file = tmp_path / "folded.pt2"
    result = gammabeta("fold", trained_run, "--out", file, "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["same_predictions"] == document["images"] == 200
    assert [layer["outcome"] for layer in document["fold"]["layers"]] == ["folded"] * 3
    assert torch.export.load(file).module()(torch.randn(3, 1, 28, 28)).shape == (3, 10)
    shown = gammabeta("fold", trained_run)
    assert "bn2    folded   after conv2" in shown.out
    assert "200 of 200 test images get the same prediction" in shown.out


def test_predict_answers_alike_from_the_run_and_from_its_onnx_file(
    gammabeta, trained_run, tmp_path, pictures
):
    file = tmp_path / "model.onnx"
    result = gammabeta("export", trained_run, "--out", file, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["error"] <= 1e-5
    answers = []
    for source in (trained_run, file):
        result = gammabeta("predict", source, *pictures, "--top", "3", "--json")
        assert result.code == 0, result.err
        answers.append([row["predictions"] for row in json.loads(result.out)["predictions"]])
    for ours, theirs in zip(*answers, strict=True):
        assert [guess["class"] for guess in ours] == [guess["class"] for guess in theirs]
        assert np.allclose([g["probability"] for g in ours], [g["probability"] for g in theirs], atol=1e-5)


def test_predict_on_an_onnx_file_loads_no_torch(gammabeta, trained_run, tmp_path, pictures):
    file = tmp_path / "model.onnx"
    assert gammabeta("export", trained_run, "--out", file).code == 0
    code = (
        "import sys\n"
        "from gammabeta.cli.app import run\n"
        f"assert run(['predict', {str(file)!r}, {str(pictures[0])!r}]) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_errors_are_one_line_and_leave_the_file(gammabeta, trained_run, tmp_path, pictures):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"old")
    assert gammabeta("export", tmp_path / "none", "--out", file).code == 2
    result = gammabeta("export", trained_run, "--out", tmp_path / "no" / "model.onnx")
    assert result.code == 2
    assert "is not a folder: --out must name a file" in result.err
    result = gammabeta("predict", file, pictures[0])
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert file.read_bytes() == b"old"


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "their_models.py").write_text(
        "from torch import nn\n"
        "def small():\n"
        "    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU())\n"
    )
    monkeypatch.chdir(tmp_path)
    return "their_models:small"


def test_a_model_of_the_user_s(gammabeta, factory, tmp_path):
    result = gammabeta("fold", factory, "--shape", "2x9", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["fold"]["layers"][0]["outcome"] == "folded"
    result = gammabeta("export", factory, "--shape", "2x9")
    assert result.code == 0, result.err
    assert (tmp_path / "model.onnx").is_file()
    for shape, message in ((None, "--shape 3x224x224"), ("2x-9", "not '2x-9'")):
        result = gammabeta("fold", factory, *([] if shape is None else ["--shape", shape]))
        assert result.code == 2
        assert message in result.err


@pytest.mark.parametrize("command", ["fold", "export"])
def test_a_name_that_is_nothing_is_told_before_a_missing_shape(gammabeta, command):
    result = gammabeta(command, "nowhere")
    assert result.code == 2
    assert "neither a run folder nor module:function" in result.err


@pytest.mark.parametrize("command", ["fold", "export"])
def test_weights_from_a_file_are_loaded_into_a_run_too(gammabeta, trained_run, tmp_path, command):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    weights = load_file(run / "model.safetensors")
    save_file({**weights, "fc2.bias": torch.zeros(3)}, tmp_path / "other.safetensors")
    result = gammabeta(command, run, "--weights", tmp_path / "other.safetensors")
    assert result.code == 2
    assert "fc2.bias is (3,) where (10,) is wanted" in result.err
    assert not (run / "model.onnx").exists()
