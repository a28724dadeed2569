"""``gammabeta.benchmark`` on small models: equal first, then timed; what cannot be had says why."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import gammabeta as gb
from gammabeta.errors import UsageError
from gammabeta.measure.report import EVALUATION, TRAINING, TUNING
from gammabeta.measure.timing import interleave

quick = partial(gb.benchmark, seconds=0.01, beside=())


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


X = torch.randn(4, 3, 8, 8)


def test_every_way_is_compared_and_timed():
    report = quick(network(), X)
    ways = {(row.task, row.way) for row in report.rows}
    assert ways == {
        *((TRAINING, way) for way in ("as it is", "fused", "fused, recompute")),
        *((TUNING, way) for way in ("as it is", "tune")),
        *((EVALUATION, way) for way in ("as it is", "folded")),
    }
    for row in report.rows:
        assert row.lower <= row.seconds <= row.upper
        assert row.apart < 1e-5
        assert (row.kept is None) == (row.task == EVALUATION)
    assert report.row(TUNING, "tune").kept < report.row(TUNING, "as it is").kept
    assert 0 < report.share < 1
    assert report.norms == 1


def test_the_model_is_left_as_it_is():
    model = network().eval()
    before = copy.deepcopy(model.state_dict())
    quick(model, X)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_given_loss_is_used():
    seen = []

    def loss(output):
        seen.append(output.shape)
        return output.sum()

    quick(network(), X, loss=loss)
    assert (4, 4) in seen


def test_keyword_arguments_and_evaluation_alone():
    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, *, image):
            return {"logits": self.inner(image)}

    report = quick(Takes(), {"image": X}, training=False)
    assert {row.task for row in report.rows} == {EVALUATION}
    assert report.share is None


def test_what_gives_other_outputs_is_not_timed(monkeypatch):
    def wrong(model, example):
        folded = copy.deepcopy(model)
        folded[4].bias.data += 1
        return folded

    monkeypatch.setattr("gammabeta.measure.variants.fold", wrong)
    row = next(r for r in quick(network(), X).rows if r.way == "folded")
    assert row.seconds is None
    assert "differ" in row.reason


@pytest.mark.parametrize(
    ("model", "example", "settings", "message"),
    [
        (nn.Linear(3, 3), X, {}, "no batch normalization"),
        (network(), torch.randn(4, 2, 8, 8), {}, "does not run on the example"),
        (network(), X, {"beside": ["tensorrt"]}, "unknown 'tensorrt'"),
        (network(), X, {"seconds": 0}, "above 0"),
        (network().requires_grad_(False), X, {}, "training=False"),
        (network(), None, {}, "example must be"),
    ],
)
def test_mistakes_are_one_line(model, example, settings, message):
    with pytest.raises(UsageError, match=message) as caught:
        gb.benchmark(model, example, **{"seconds": 0.01, "beside": ()} | settings)
    assert "\n" not in str(caught.value)


def test_time_ends_the_rounds_and_three_are_made():
    rounds = interleave({"a": lambda: None}, rounds=50, seconds=1e-9)["a"].rounds
    assert rounds == 3


@pytest.mark.slow
def test_other_compilers_stand_beside():
    pytest.importorskip("onnxruntime")
    report = gb.benchmark(network(), X, seconds=0.1)
    assert report.row(TRAINING, "torch.compile"), report
    assert report.row(EVALUATION, "torch.compile"), report
    assert report.row(EVALUATION, "ONNX Runtime"), report
