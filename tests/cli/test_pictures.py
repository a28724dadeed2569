"""Folders of any pictures train with no option; other networks train by their names."""

import json
import sys

import pytest
import torch

from benchmarks.foreign.stub import import_timm
from benchmarks.harness.shapes import write_shapes
from gammabeta.errors import RunError
from gammabeta.train import Run, load_model

NETS = """
from torch import nn

def small():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    )

def wrong():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))
"""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes") / "shapes", 12)


def test_a_folder_of_mixed_pictures_needs_no_option(gammabeta, shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = gammabeta("train", shapes, "--epochs", 1, "--set", "width=4", "--precision", "fp32")
    assert code == 0, err
    assert (
        "Recipe pictures, 1 epochs: colour pictures of 64×64; --recipe and --epochs choose otherwise" in out
    )
    assert "are resized to 64×64; --image-size HxW takes another size" in err
    (path,) = (tmp_path / "runs").iterdir()
    run = Run.open(path)
    assert (run.recipe.name, run.info.network.kind, run.info.network.base_width) == (
        "pictures",
        "residual",
        4,
    )
    assert run.preparation.fit == "stretch"
    judged = json.loads(gammabeta("evaluate", path, "--json").out)
    assert judged["accuracy"] == run.info.result["test_accuracy"]
    picture = next(shapes.glob("circle/*.png"))
    assert json.loads(gammabeta("predict", path, picture, "--json").out)["predictions"]
    assert gammabeta("export", path, "--out", tmp_path / "m.onnx").code == 0
    assert gammabeta("predict", tmp_path / "m.onnx", picture).code == 0

    code, out, err = gammabeta(
        "train", shapes, "--init", path, "--epochs", 1, "--set", "width=4", "-o", "more"
    )
    assert code == 0, err
    assert "beginning with the weights of" in out.lower()


def test_ones_own_network_is_named_and_named_again(gammabeta, shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_nets.py").write_text(NETS, "utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    few = ["--epochs", 1, "--quiet", "--out"]
    assert gammabeta("train", shapes, "--model", "my_nets:small", *few, "run").code == 0
    assert Run.open("run").info.network.model == "my_nets:small"
    with pytest.raises(RunError, match="name it with --model my_nets:small"):
        load_model("run")
    assert "name it with --model" in gammabeta("evaluate", "run").err
    judged = json.loads(gammabeta("evaluate", "run", "--model", "my_nets:small", "--json").out)
    assert judged["accuracy"] == Run.open("run").info.result["test_accuracy"]
    more = gammabeta("train", "--resume", "run", "--model", "my_nets:small", "--epochs", 2, "--quiet")
    assert more.code == 0, more.err

    weights = tmp_path / "weights.pt"
    torch.save({"0.weight": torch.zeros(4, 3, 3, 3), "5.weight": torch.zeros(9, 4)}, weights)
    begun = ["--model", "my_nets:small", "--init", weights, "--epochs", 1, "--out", "begun"]
    assert "beginning with the weights of" in gammabeta("train", shapes, *begun).out.lower()

    code, _, err = gammabeta("train", shapes, "--model", "my_nets:wrong", *few, "no")
    assert (code, "logits of shape (2, 3) are needed" in err) == (2, True)
    assert "could not be imported" in gammabeta("train", shapes, "--model", "nothing:here", *few, "no").err


@pytest.mark.slow
def test_timms_networks_are_found_by_name(gammabeta, shapes, tmp_path):
    import_timm()
    run = tmp_path / "run"
    settings = ["--model", "timm:resnet10t", "--image-size", "32", "--epochs", 1, "--quiet", "--out", run]
    result = gammabeta("train", shapes, *settings)
    assert result.code == 0, result.err
    assert type(load_model(run, "cpu").model).__name__.endswith("ResNet")
    for name in ("timm:resnet_of_mine", "timm:hf-hub:somebody/resnet"):
        code, _, err = gammabeta("train", shapes, "--model", name, "--quiet", "--out", tmp_path / "no")
        assert (code, "timm has no model" in err) == (2, True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_shapes_are_told_apart(gammabeta, tmp_path):
    """The task of `benchmarks/run.py pictures`: no option, 260 pictures of each of three shapes."""
    folder = write_shapes(tmp_path / "shapes", 260)
    document = json.loads(gammabeta("train", folder, "--out", tmp_path / "run", "--json").out)
    assert document["test_accuracy"] >= 0.95
