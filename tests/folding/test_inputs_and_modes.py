"""Folding whatever a model takes, gives and calls, and whatever mode the caller is in."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gammabeta as gb
from gammabeta.folding.verify import run

_BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.insert(0, _BENCHMARKS)
try:
    from fold_case_models import randomised
finally:
    sys.path.remove(_BENCHMARKS)

MAP = (4, 3, 9, 9)


class _Two(nn.Module):
    """A convolution and a batch norm; ``forward`` is the case's."""

    def __init__(self, norm=None):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), norm or nn.BatchNorm2d(8)


class _ReadsTheChild(_Two):
    def forward(self, x):
        bn = self.bn
        y = F.batch_norm(
            self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps
        )
        return F.relu(y)


class _Activates(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x):
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return self.act(y)


class _CallsTorch(_Two):
    def forward(self, x):
        bn, y = self.bn, self.conv(x)
        state = bn.weight, bn.bias, bn.running_mean, bn.running_var
        return torch.batch_norm(y, *state, False, 0.0, bn.eps, False)


class _CallsForward(_Two):
    def forward(self, x):
        return self.bn.forward(self.conv(x))


def _same(folded, model, *args):
    model.eval()
    with torch.no_grad():
        got, wanted = run(folded, (args, {})), run(model, (args, {}))
    assert len(got) == len(wanted) > 0
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "build",
    [
        _ReadsTheChild,
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), _Activates(8)),
        _CallsTorch,
        _CallsForward,
        lambda: _CallsForward(gb.nn.BatchNorm2d(8, activation="relu")),
    ],
    ids=["child's buffers", "own buffers", "torch's order", "forward", "forward and activation"],
)
def test_a_norm_that_is_not_called_as_a_module(build):
    model = randomised(build())
    folded = gb.fold(model, torch.randn(MAP))
    # Folded only where the source surely shows the way; right in any case.
    assert folded.fold_report.layers[0].outcome in ("folded", "left")
    _same(folded, model, torch.randn(MAP))


class _Codes(_Two):
    """Refuses what is not a probability, an unsorted length or a code it does not know."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(3))

    def forward(self, x, codes, lengths):
        assert float(x.min()) >= 0
        assert float(x.max()) <= 1
        assert lengths.tolist() == sorted(lengths.tolist())
        gain = self.table[codes] if set(codes.tolist()) <= {0, 2} else None
        return self.bn(self.conv(x)) * gain[:, None, None, None]


def test_only_the_given_values_are_tried():
    model = randomised(_Codes())
    inputs = torch.rand(MAP), torch.tensor([0, 2, 2, 0]), torch.tensor([1, 2, 3, 4])
    folded = gb.fold(model, inputs)
    assert [layer.outcome for layer in folded.fold_report.layers] == ["left"]  # Python reads values
    _same(folded, model, *inputs)


class _Pair(NamedTuple):
    x: torch.Tensor
    gain: torch.Tensor


@dataclass
class _Batch:
    x: torch.Tensor
    gain: torch.Tensor
    name: str = "batch"


class _Slots:
    __slots__ = ("y",)

    def __init__(self, y):
        self.y = y


class _TakesAnObject(_Two):
    def forward(self, batch):
        return _Batch(_Slots(self.bn(self.conv(batch.x))), batch.gain)


@pytest.mark.parametrize("kind", [_Pair, _Batch])
def test_an_object_keeps_its_type_and_what_it_holds_is_compared(kind):
    model, batch = randomised(_TakesAnObject()), kind(torch.randn(MAP), torch.rand(4))
    for example in (batch, (batch,), {"batch": batch}):
        folded = gb.fold(model, example)
        assert len(folded.fold_report.folded) == 1
    assert len(run(model.eval(), ((batch,), {}))) == 2
    _same(folded, model, batch)


class _HasASpare(_Two):
    def __init__(self):
        super().__init__()
        self.spare = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn(self.conv(x))


def test_a_norm_that_did_not_run_is_in_the_report():
    layers = gb.fold(randomised(_HasASpare()), torch.randn(MAP)).fold_report.layers
    assert [(layer.name, layer.outcome) for layer in layers] == [("bn", "folded"), ("spare", "left")]
    assert layers[1].reason == "it did not run on the example"


def _autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize(
    "mode",
    [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["inference", "autocast"],
)
def test_the_caller_s_mode_does_not_enter_the_folded_model(mode):
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    outside = gb.fold(model, torch.randn(MAP))
    with mode():
        folded = gb.fold(model, torch.randn(MAP))
    assert folded.fold_report.packed == outside.fold_report.packed
    assert not any(tensor.is_inference() for tensor in folded.state_dict().values())
    folded(torch.randn(MAP)).sum().backward()
    _same(folded, model, torch.randn(MAP))
