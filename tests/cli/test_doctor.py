"""The doctor and recalibrate on the command line: targets, exit codes, files, one-line errors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gammabeta as gb

MODULE = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(144, 3))

def loader():
    torch.manual_seed(1)
    return [(torch.randn(32, 1, 8, 8) * 2 + 1, torch.randint(0, 3, (32,))) for _ in range(6)]

def loss(output, target):
    return torch.nn.functional.cross_entropy(output, target)

def broken():
    raise RuntimeError("no such disk")

def spare():
    model = make()
    model.more = nn.BatchNorm2d(3)
    model.forward = nn.Sequential(*list(model)[:-1]).forward
    return model

def two_inputs():
    model = make()
    model.forward = lambda x, z: x + z
    return model

class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x):
        raise RuntimeError("cannot multiply")

number = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a module in the current directory, another for every test."""
    name = f"models_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_a_fresh_model_is_ill_and_recalibration_mends_it(gammabeta, here):
    command = ("doctor", f"{here}:make", "--data", f"{here}:loader")
    ill = gammabeta(*command)
    assert ill.code == 1
    assert "never-updated" in ill.out
    mended = gammabeta(
        "doctor",
        f"{here}:make",
        "--data",
        f"{here}:loader",
        "--fix",
        "recalibrate",
        "--out",
        "mended.safetensors",
    )
    assert mended.code == 0
    assert "never-updated" in mended.out  # what was wrong
    assert "Healthy" in mended.out  # and what is left
    again = gammabeta(*command, "--weights", "mended.safetensors", "--quiet")
    assert again.code == 0
    assert again.out.startswith("Healthy")


def test_json_and_html(gammabeta, here):
    result = gammabeta(
        "doctor",
        f"{here}:make",
        "--data",
        f"{here}:loader",
        "--loss",
        f"{here}:loss",
        "--json",
        "--html",
        "page.html",
    )
    document = json.loads(result.out)
    assert result.code == 1
    assert document["schema"] == "gammabeta.doctor/1"
    assert document["samples"] == 192
    assert document["gap"]["evaluation"] is not None
    assert Path("page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(("severity", "code"), [("error", 1), ("warning", 1), ("note", 1)])
def test_severity_decides_the_exit_code(gammabeta, here, severity, code):
    assert gammabeta("doctor", f"{here}:make", "--severity", severity, "--json").code == code
    gammabeta("recalibrate", f"{here}:make", "--data", f"{here}:loader", "--out", "w.pt", "--quiet")
    state = torch.load("w.pt", weights_only=True)
    state["1.weight"][0] = 1e-7  # one dead channel of four: a warning
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, "w.pt")
    result = gammabeta("doctor", f"{here}:make", "--weights", "w.pt", "--severity", severity, "--quiet")
    assert result.code == (0 if severity == "error" else 1)


def test_recalibrate_saves_what_the_library_computes(gammabeta, here):
    result = gammabeta(
        "recalibrate",
        f"{here}:make",
        "--data",
        f"{here}:loader",
        "--mode",
        "in-order",
        "-o",
        "w.safetensors",
        "--json",
    )
    assert json.loads(result.out)["samples"] >= 192
    import importlib

    module = importlib.import_module(here)
    expected = gb.recalibrate(module.make(), module.loader(), mode="in-order").state_dict()
    saved = load_file("w.safetensors")
    assert all(torch.equal(saved[key], expected[key]) for key in expected)


def test_what_was_not_recalibrated_is_a_note_and_not_counted(gammabeta, here):
    done = gammabeta("recalibrate", f"{here}:spare", "--data", f"{here}:loader", "-o", "w.pt")
    assert done.code == 0
    assert done.err == "gammabeta: note: not recalibrated: more: the data did not reach it\n"
    assert "1 layer recalibrated from" in done.out
    again = gammabeta("recalibrate", f"{here}:spare", "--data", f"{here}:loader", "-o", "w.pt", "--json")
    assert json.loads(again.out)["kept"] == {"more": "the data did not reach it"}


@pytest.mark.parametrize("command", [("doctor",), ("recalibrate", "-o", "w.pt")])
def test_a_batch_that_does_not_fit_is_explained_without_python(gammabeta, here, command):
    failed = gammabeta(*command, f"{here}:two_inputs", "--data", f"{here}:loader")
    assert failed.code == 2
    assert "missing a required argument: 'z'" in failed.err
    assert f"or {here}:two_inputs a model that takes the batch" in failed.err
    assert "forward_fn" not in failed.err


def test_a_run_of_ours(gammabeta, trained_run, tmp_path):
    before = {path: path.read_bytes() for path in trained_run.rglob("*") if path.is_file()}
    found = gammabeta("doctor", trained_run, "--samples", "256")
    assert found.code in (0, 1)
    assert "batch-normalization layers on 256 samples" in " ".join(found.out.split())
    done = gammabeta("recalibrate", trained_run, "--out", tmp_path / "w.safetensors")
    assert done.code == 0
    assert "3 layers recalibrated from 640 samples" in done.out
    mended = gammabeta(
        "doctor", trained_run, "--weights", tmp_path / "w.safetensors", "--samples", "0", "--quiet"
    )
    assert mended.code == 0
    assert before == {path: path.read_bytes() for path in before}


def test_a_data_set_of_ours_for_any_model(gammabeta, here, digits_file):
    Path("net.py").write_text(
        "from torch import nn\n"
        "def make():\n    return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(784, 10))\n",
        encoding="utf-8",
    )
    result = gammabeta(
        "doctor", "net:make", "--data", digits_file, "--split", "test", "--samples", "100", "--json"
    )
    assert json.loads(result.out)["samples"] == 128


ERRORS = [
    (["doctor", "nowhere"], "neither a run folder nor module:function"),
    (["doctor", "runs/:heart: $x$"], "neither a run folder nor module:function"),
    (["doctor", "{0}.py:make"], "name a function of it, as in {0}:make"),
    (["doctor", "{0}:nothing"], "has no nothing"),
    (["doctor", "no_such_module:make"], "could not be imported"),
    (["doctor", "{0}:broken"], "no such disk"),
    (["doctor", "{0}:number"], "function that takes no arguments"),
    (["doctor", "{0}:loader"], "not a torch.nn.Module"),
    (["doctor", "{0}:make", "--data", "{0}:number"], "not something to iterate over"),
    (["doctor", "{0}:make", "--data", "data/:a:"], "no such data set or path"),
    (["doctor", "{0}:make", "--data", "mnist", "--split", "all"], "unknown split"),
    (["doctor", "{0}:make", "--weights", "none.safetensors"], "no weights file"),
    (["doctor", "{0}:make", "--weights", "none.pt"], "does not exist"),
    (["doctor", "{0}:make", "--weights", "{0}.py"], "not a torch file"),
    (["doctor", "{0}:make", "--weights", "other.safetensors"], "does not fit"),
    (["doctor", "{0}:make", "--severity", "bad"], "unknown severity"),
    (["doctor", "{0}:make", "--source", "caffe"], "unknown source"),
    (["doctor", "{0}:make", "--fix", "magic", "--out", "w.pt"], "only recalibrate"),
    (["doctor", "{0}:make", "--fix", "recalibrate"], "go together"),
    (["doctor", "{0}:make", "--fix", "recalibrate", "--out", "w.pt"], "needs data"),
    (["doctor", "{0}:make", "--html", "no/such/page.html"], "not a folder"),
    (["doctor", "{0}:make", "--html", "."], "is a folder"),
    (["doctor", "{0}:make", "--data", "{0}:loader", "--loss", "{0}:number"], "must name a function"),
    (["doctor", "{0}:Fails", "--data", "{0}:loader"], "cannot multiply"),
    (["recalibrate", "{0}:make", "--out", "w.pt"], "needs data"),
    (["recalibrate", "{0}:make", "--data", "{0}:loader", "--out", "no/such/w.pt"], "not a folder"),
    (["recalibrate", "{0}:make", "--data", "{0}:loader", "--out", "w.pt", "--mode", "both"], "unknown mode"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS)
def test_what_cannot_run_is_one_line_and_exit_code_2(gammabeta, here, arguments, message):
    save_file({"a": torch.zeros(2)}, "other.safetensors")
    result = gammabeta(*(argument.format(here) for argument in arguments))
    assert result.code == 2
    assert message.format(here) in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert not Path("w.pt").exists()


def test_weights_that_would_run_code_are_refused(gammabeta, here):
    class Evil:
        def __reduce__(self):
            return Path.write_text, (Path("owned"), "x")

    torch.save({"state_dict": {}, "evil": Evil()}, "evil.pt")
    result = gammabeta("doctor", f"{here}:make", "--weights", "evil.pt")
    assert result.code == 2
    assert not Path("owned").exists()
