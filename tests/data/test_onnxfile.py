"""Reading ONNX files without torch: right answers, and one line for every damaged file."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from gammabeta.data.onnxfile import OnnxClassifier
from gammabeta.errors import DataError, UnavailableError

GOOD = {
    "classes": ["dark", "light"],
    "preprocessing": {
        "channels": 1, "height": 2, "width": 3, "mean": [100.0], "scale": [0.5], "style": "plain",
    },
}  # fmt: skip


def _write(path, document=GOOD, shape=("batch", 1, 2, 3)):
    """Write a model whose logits are minus and plus the sum of its input."""
    x = helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])
    signs = helper.make_tensor("signs", TensorProto.FLOAT, [6, 2], [-1.0, 1.0] * 6)
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"]),
        helper.make_node("MatMul", ["flat", "signs"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y], [signs])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if document is not None:
        entry = model.metadata_props.add()
        entry.key, entry.value = "gammabeta", document if isinstance(document, str) else json.dumps(document)
    onnx.save(model, path)
    return path


def test_logits_and_probabilities(tmp_path):
    model = OnnxClassifier.open(_write(tmp_path / "m.onnx"))
    pictures = np.arange(600 * 6, dtype=np.uint8).reshape(600, 1, 2, 3)
    total = ((pictures.astype(np.float64) - 100) * 0.5).sum((1, 2, 3))
    logits = model.logits(pictures)
    assert logits.dtype == np.float32
    assert np.allclose(logits, np.stack([-total, total], 1))
    shares = model.probabilities(pictures)
    assert np.allclose(shares.sum(1), 1)
    assert np.allclose(shares[:, 1], 1 / (1 + np.exp(-2 * np.clip(total, -300, 300))))
    assert model.probabilities(pictures[:0]).shape == (0, 2)
    assert model.classes == ("dark", "light")
    assert model.style == "plain"


def test_pictures_of_another_form_are_refused(tmp_path):
    model = OnnxClassifier.open(_write(tmp_path / "m.onnx"))
    for pictures in (np.zeros((1, 1, 3, 2), np.uint8), np.zeros((1, 1, 2, 3), np.float32)):
        with pytest.raises(DataError, match="takes uint8 pictures"):
            model.logits(pictures)


def _changed(**values):
    return {**GOOD, "preprocessing": {**GOOD["preprocessing"], **values}}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (None, "was not written by"),
        ("{", "does not name"),
        ({"classes": None, "preprocessing": None}, "does not name"),
        ({"classes": ["a"]}, "does not name"),
        (_changed(height="x"), "damaged"),
        (_changed(mean=[1.0, 2.0]), "damaged"),
        (_changed(style="upside down"), "damaged"),
        (_changed(width=4), "does not take the pictures"),
        (_changed(mean=[float("nan")]), "damaged"),
        ({**GOOD, "classes": ["a", "b", "c"]}, "gives another number"),
        (_changed(height="2"), "damaged"),
        (_changed(width=3.5), "damaged"),
        (_changed(preparation={"channels": 1, "height": "2", "width": 3}), "height"),
        (_changed(preparation=[]), "preparation is damaged"),
        (_changed(preparation={"channels": 1, "height": 2}), "preparation is damaged"),
        (_changed(preparation={"channels": 1, "height": 9, "width": 3}), "two inputs"),
        (
            _changed(preparation={"channels": 1, "height": 2, "width": 3, "fit": "x"}),
            "preparation is damaged",
        ),
    ],
)
def test_metadata_that_cannot_be(tmp_path, document, message):
    with pytest.raises(DataError, match=message):
        OnnxClassifier.open(_write(tmp_path / "m.onnx", document))


def test_files_that_are_no_models(tmp_path):
    with pytest.raises(DataError, match="there is no file"):
        OnnxClassifier.open(tmp_path / "none.onnx")
    whole = _write(tmp_path / "m.onnx").read_bytes()
    for content in (b"", b"no model", whole[: len(whole) // 2]):
        path = tmp_path / "bad.onnx"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.onnx"):
            OnnxClassifier.open(path)


def test_without_onnxruntime(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UnavailableError, match=r"\.\[onnx\]"):
        OnnxClassifier.open(_write(tmp_path / "m.onnx"))


def test_no_torch_is_loaded(tmp_path):
    path = _write(tmp_path / "m.onnx")
    code = (
        "import sys, numpy as np\n"
        "from gammabeta.data.onnxfile import OnnxClassifier\n"
        f"OnnxClassifier.open({str(path)!r}).logits(np.zeros((1, 1, 2, 3), np.uint8))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
