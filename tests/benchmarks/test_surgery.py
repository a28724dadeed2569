"""The judge of surgery: what it sees of a model, when it says wrong, and that a run goes on after a stop."""

import argparse
import copy
import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.foreign import measure, stub, watch
from benchmarks.foreign.models import Foreign
from benchmarks.harness import Options
from benchmarks.suites import surgery


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.bn3 = nn.BatchNorm2d(3)

    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)))
        z = F.silu(self.bn2(self.conv2(y)) + x)
        w = self.bn3(z)
        return F.relu(w) + w


def images(batch, size, seed):
    return (torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)),)


BLOCK = Foreign("own block", Block, images, (8,))


def test_followers_are_activations_at_once_or_behind_a_sum():
    ran, behind = watch.followers(Block().eval(), lambda m: m(*images(2, 8, 0)))
    assert ran == ["bn", "bn2", "bn3"]
    assert behind == [("relu", {"bn"}), ("silu", {"bn2"})]  # bn3's output is used twice


def test_statistics_are_those_of_the_inputs():
    model = Block().double()
    x = images(4, 8, 0)[0].double()
    found = watch.statistics(model, lambda m: m(x))
    y = model.conv(x)
    torch.testing.assert_close(found["bn"], (y.mean((0, 2, 3)), y.transpose(0, 1).flatten(1).var(1)))
    assert not model.bn.num_batches_tracked


def test_an_honest_conversion_is_ok_and_counted():
    row = measure.measure(BLOCK)
    assert {name: row[name]["outcome"] for name in measure.OPERATIONS} == dict.fromkeys(
        measure.OPERATIONS, "ok"
    )
    assert (row["norms"], row["activations"]) == (3, 2)
    assert row["convert"]["ours"] == 3
    assert row["convert"]["fused"] == 2


@pytest.mark.parametrize("fault", ["outputs", "momentum", "given", "crash"])
def test_a_wrong_conversion_is_noticed(fault, monkeypatch):
    right = measure.gb.convert

    def convert(model, example=None):
        if fault == "crash":
            raise AssertionError("first line\nsecond line")
        converted = copy.deepcopy(right(model))
        if fault == "given":
            with torch.no_grad():
                model.bn.weight.add_(1e-6)
        if fault == "outputs":
            with torch.no_grad():
                converted.bn.weight.mul_(1 + 1e-5)
        if fault == "momentum":
            converted.bn.momentum = 0.11
        return converted

    monkeypatch.setattr(measure.gb, "convert", convert)
    row = measure.measure(BLOCK, ("convert",))["convert"]
    assert row["outcome"] == ("crash" if fault == "crash" else "wrong")
    assert (
        row["why"]
        == {
            "outputs": row["why"],
            "momentum": row["why"],
            "given": "the model given has another bn.weight",
            "crash": "AssertionError: first line",
        }[fault]
    )


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    calls = []

    def counted(foreign, operations):
        calls.append(foreign.name)
        if foreign.name.startswith("none"):
            raise ImportError(foreign.name)
        return {"model": foreign.name, "skipped": "of a test"}

    models = {name: Foreign(name, Block, images) for name in ("a 1", "a 2", "none 3")}
    monkeypatch.setattr(surgery, "everything", lambda: models)
    monkeypatch.setattr(surgery, "measure", counted)
    for only, expected in ((["a 1"], ["a 1"]), (None, ["a 1", "a 2", "none 3"])):
        result = surgery.run(Options(out=tmp_path, given=argparse.Namespace(only=only)))
        assert calls == expected
    assert [row["model"] for row in result.measured] == ["a 1", "a 2"]
    assert result.notes[0] == "1 models of none left out: not installed."
    assert result.summary == {
        "models": "0 of the 3 of the list, and 2 left out"
    }  # nothing of what was not run
    surgery.run(Options(out=tmp_path, given=argparse.Namespace(again=True)))
    assert len(calls) == 6


@pytest.mark.slow
def test_several_processes_measure_at_a_time(tmp_path):
    pytest.importorskip("pytorchcv")
    names = ["pytorchcv resnet20_cifar10", "pytorchcv preresnet20_cifar10"]
    given = argparse.Namespace(only=names, operation=["recalibrate"], jobs=2)
    result = surgery.run(Options(out=tmp_path, given=given))
    assert [(row["model"], row["recalibrate"]["outcome"]) for row in result.measured] == [
        (name, "ok") for name in names
    ]


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_the_stand_in_is_there_for_a_while_only():
    with stub.installed():
        from torchvision.ops.misc import FrozenBatchNorm2d
        from torchvision.transforms import Anything, functional

        assert functional.InterpolationMode.NEAREST != functional.InterpolationMode.BICUBIC
        assert isinstance(Anything, type)
        x = torch.randn(2, 3, 4, 4)
        expected = nn.BatchNorm2d(3).eval()(x)
        torch.testing.assert_close(FrozenBatchNorm2d(3)(x), expected)
    assert not any(name.startswith("torchvision") for name in sys.modules)
    assert importlib.util.find_spec("torchvision") is None
