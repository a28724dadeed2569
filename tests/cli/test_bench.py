"""``gammabeta bench``."""

import json

import pytest

MODEL = """
from torch import nn

def make():
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench_models.py").write_text(MODEL)


def bench(gammabeta, *more):
    rest = ("--seconds", "0.1", "--without", "compile", "--without", "onnx")
    return gammabeta("bench", "bench_models:make", "--input", "32x8", *rest, *more)


def test_a_table_and_one_sentence(gammabeta):
    result = bench(gammabeta)
    assert result.code == 0
    for words in ("training step", "fused, recompute", "evaluation", "folded", "1 batch norm"):
        assert words in result.out
    assert result.out.splitlines()[-1].endswith(".")
    assert bench(gammabeta, "--quiet").out.count("\n") == 1


def test_json_has_the_figures(gammabeta):
    found = json.loads(bench(gammabeta, "--json").out)
    assert found["input"] == "32x8"
    assert all(row["seconds"] > 0 for row in found["rows"])
    assert found["advice"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bench_models:make"], "--input"),
        (["bench_models:make", "--input", "32xa"], "batch first"),
        (["bench_models:make", "--input", "32x9"], "does not run on the example"),
        (["bench_models:make", "--input", "32x8", "--without", "jax"], "compile or onnx"),
        (["nowhere", "--input", "32x8"], "timm:NAME"),
    ],
)
def test_mistakes_end_in_one_line(gammabeta, arguments, says):
    result = gammabeta("bench", *arguments)
    assert result.code == 2
    assert says in result.err
    assert result.err.count("\n") == 1
