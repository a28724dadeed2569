"""The suite ``models``: networks may be timed one by one, and rewritten calls are compared with told ones."""

import argparse

import pytest
import torch
from torch import nn

from benchmarks.harness import Options, report
from benchmarks.suites import models


def row(name, rounds):
    return {"case": f"{name}, batch 8", "times faster": float(rounds), "times faster, recompute": 1.0}


def test_networks_that_are_not_asked_for_keep_their_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_row", row)
    monkeypatch.setattr(models, "guards", lambda: {"rewritten": 12e-6, "told": 10e-6})
    for name in ("ResNet-50", "MobileNetV2"):
        result = models.run(Options(out=tmp_path, given=argparse.Namespace(only=[name])))
        report.write("models", result, tmp_path)
    assert [row["case"] for row in result.rows] == ["ResNet-50, batch 8", "MobileNetV2, batch 8"]
    assert result.summary["training step"] == "geometric mean 9.00×, least 9.00×"
    assert "2.0 µs for the guards" in " ".join(result.summary.values())


def test_a_network_without_its_norms_keeps_the_activations():
    class WithActivation(nn.BatchNorm2d):
        def __init__(self):
            super().__init__(3)
            self.act = nn.SiLU()

    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), WithActivation())
    kinds = [type(module) for module in models._without_norms(model)]
    assert kinds == [nn.Conv2d, nn.Identity, nn.ReLU, nn.SiLU]


@pytest.mark.parametrize("kind", [models._Two, models._Direct])
def test_both_ways_of_the_guards_give_the_same(kind):
    torch.manual_seed(0)
    x = torch.randn(4, 16, 3, 3)
    found = models.convert(kind()) if kind is models._Two else kind()
    if kind is models._Direct:
        found.bn = models.convert(found.bn)
    torch.testing.assert_close(found(x), models._Two()(x))
