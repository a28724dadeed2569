"""ONNX files: right, described, and whole or not there."""

import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import gammabeta as gb
from gammabeta.errors import SurgeryError, UnavailableError, UsageError
from gammabeta.export import Preprocessing, save_program


def _model():
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3),
        gb.nn.BatchNorm2d(6, activation="relu", pool=2),
        nn.ReLU(),
        gb.nn.BatchNorm2d(6, activation="silu"),  # stays: what comes before is no convolution
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(6 * 25, 4),
        nn.BatchNorm1d(4),
    )
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
    return model


EXAMPLE = (2, 1, 12, 12)


def test_the_file_computes_what_the_model_does_at_any_batch_size(tmp_path):
    model, path = _model(), tmp_path / "m.onnx"
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = gb.export_onnx(model, path, torch.randn(EXAMPLE), classes=list("abcd"))
    assert model.training
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert report.error <= 1e-5
    assert report.size == path.stat().st_size
    assert [layer.outcome for layer in report.fold.layers] == ["folded", "left", "folded", "folded"]
    assert json.loads(json.dumps(report.to_dict()))["path"] == str(path)

    onnx.checker.check_model(onnx.load(path), full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    model.eval().double()
    for batch in (1, 5, 8):
        x = torch.randn(batch, *EXAMPLE[1:])
        (got,) = session.run(None, {"input": x.numpy()})
        with torch.no_grad():
            wanted = model(x.double()).numpy()
        assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_the_metadata_names_classes_and_preprocessing(tmp_path):
    path = tmp_path / "m.onnx"
    given = Preprocessing(1, 12, 12, (33.0,), (0.0125,), "digit")
    gb.export_onnx(_model(), path, torch.randn(EXAMPLE), classes=("a", "b", "c", "d"), preprocessing=given)
    entries = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    document = json.loads(entries["gammabeta"])
    assert document["classes"] == ["a", "b", "c", "d"]
    assert document["preprocessing"] == {
        "channels": 1, "height": 12, "width": 12, "mean": [33.0], "scale": [0.0125], "style": "digit",
        "temperature": 1.0,
    }  # fmt: skip
    assert document["folded"] == ["1", "4", "7"]
    assert "3" in document["left"]


def test_a_batch_of_one_leaves_the_batch_open(tmp_path):
    path = tmp_path / "m.onnx"
    gb.export_onnx(_model(), path, torch.randn(1, 1, 12, 12))
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_param


class _Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else x


@pytest.mark.parametrize("stage", ["trace", "check", "compare", "write"])
def test_an_error_anywhere_leaves_an_existing_file_as_it_was(tmp_path, monkeypatch, stage):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    model, example = _model(), torch.randn(EXAMPLE)
    export = sys.modules["gammabeta.export"]
    wanted = SurgeryError
    if stage == "trace":
        model, example = _Untraceable(), torch.randn(2, 3)
    elif stage == "check":
        monkeypatch.setattr(onnx.checker, "check_model", _refuse)
    elif stage == "compare":
        right = export._session_run
        monkeypatch.setattr(export, "_session_run", lambda *a: [t * 1.001 for t in right(*a)])
    else:
        monkeypatch.setattr(export.os, "fsync", _no_space)
        wanted = UsageError
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(wanted):
        gb.export_onnx(model, path, example)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def _refuse(*_args, **_options):
    raise ValueError("no")


def _no_space(_file):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_library_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnavailableError, match=rf"{name} is not installed.*\.\[onnx\]"):
        gb.export_onnx(_model(), tmp_path / "m.onnx", torch.randn(EXAMPLE))


def test_a_missing_folder_or_an_empty_batch_is_refused(tmp_path):
    with pytest.raises(UsageError, match="there is no folder"):
        gb.export_onnx(_model(), tmp_path / "no" / "m.onnx", torch.randn(EXAMPLE))
    with pytest.raises(UsageError, match="batch"):
        gb.export_onnx(_model(), tmp_path / "m.onnx", torch.randn(0, 1, 12, 12))


def test_a_program_runs_at_any_batch_size(tmp_path):
    model, path = _model(), tmp_path / "m.pt2"
    folded = gb.fold(model, torch.randn(EXAMPLE))
    save_program(folded, path, torch.randn(EXAMPLE))
    x = torch.randn(7, 1, 12, 12)
    assert torch.allclose(torch.export.load(path).module()(x), folded(x), rtol=1e-5, atol=1e-6)
    assert any(isinstance(m, gb.nn.BatchNorm2d) for m in folded.modules())  # the folded model is not changed
    path.write_bytes(b"old")
    with pytest.raises(SurgeryError, match="cannot trace"):
        save_program(_Untraceable(), path, torch.randn(2, 3))
    assert path.read_bytes() == b"old"
