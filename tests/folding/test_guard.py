"""Norms that a path may miss: folded at the calls that lead to them, there at all others."""

import copy
import pickle

import pytest
import torch
from torch import nn

import gammabeta as gb
from benchmarks.fold_cases import randomised

X = torch.randn(4, 3, 9, 9)


class Block(nn.Module):
    """A flag decides whether the norm follows the convolution; another method calls another norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.use_norm = True

    def forward(self, x, *, other=False):
        if other:
            return self.away(x)
        x = self.conv(x)
        if self.use_norm:
            x = self.norm(x)
        return self.act(x)

    def away(self, x):
        return self.other(self.conv(x))


@pytest.fixture(params=[None, False], ids=["packed", "not packed"])
def pair(request, monkeypatch):
    """A model in evaluation mode and its fold, which is packed or not."""
    if request.param is False:
        monkeypatch.setattr("gammabeta.folding.unavailable", lambda: "not here")
    model = randomised(Block()).eval()
    folded = gb.fold(model, X, pack=True)
    assert bool(folded.fold_report.packed) is (request.param is None)
    return model, folded


def agree(folded, model, x, **settings):
    with torch.no_grad():
        wanted = model(x, **settings)
        assert torch.allclose(folded(x, **settings), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_the_report_says_what_is_guarded(pair):
    _, folded = pair
    report = folded.fold_report
    assert [(layer.name, layer.outcome, layer.into) for layer in report.layers] == [
        ("norm", "guarded", "conv"),
        ("other", "left", ""),
    ]
    assert "a branch may part them" in report.guarded[0].reason
    assert "0 of 2 folded, 1 guarded" in report.summary()


def test_a_call_that_meets_the_norm_runs_no_norm(pair):
    model, folded = pair
    agree(folded, model, X)
    ran = []
    forward = type(folded.norm).forward
    kind = type(
        "Watched", (type(folded.norm),), {"forward": lambda *a, **k: ran.append(1) or forward(*a, **k)}
    )
    with torch.no_grad():
        assert not ran
        folded(X)
    folded.norm.__class__ = kind  # a class that is not known is called
    agree(folded, model, X)
    assert ran


def test_other_paths_have_their_norm(pair):
    model, folded = pair
    agree(folded, model, X, other=True)
    model.use_norm = folded.use_norm = False
    agree(folded, model, X)
    model.use_norm = folded.use_norm = True
    agree(folded, model, X)


def test_what_is_changed_counts(pair):
    model, folded = pair
    agree(folded, model, X)
    for one in (model, folded):
        with torch.no_grad():
            one.conv.weight.mul_(2)
            one.norm.running_mean.add_(1)
    agree(folded, model, X)
    for one in (model, folded):
        one.norm.eps = 1.0
        one.conv.stride = (1, 1)
    agree(folded, model, X)
    for one in (model, folded):
        one.conv.weight = nn.Parameter(one.conv.weight.detach() + 0.1)
    agree(folded, model, X)
    agree(folded.double(), model.double(), X.double())
    agree(folded.float(), model.float(), X)
    seen = []
    handles = [one.conv.register_forward_hook(lambda *a: seen.append(a[2])) for one in (model, folded)]
    agree(folded, model, X)
    assert torch.allclose(seen[0], seen[1], atol=1e-5)  # a hook sees the convolution's own output
    for handle in handles:
        handle.remove()


def test_gradients_are_those_of_the_model(pair):
    model, folded = pair
    for one in (model, folded):
        one(X).sum().backward()
    assert torch.allclose(folded.conv.weight.grad, model.conv.weight.grad, rtol=1e-4, atol=1e-4)


def test_copies_pickles_and_graphs(pair):
    model, folded = pair
    again = gb.fold(folded, X)
    assert [layer.outcome for layer in again.fold_report.layers] == ["guarded", "left"]
    for one in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded)), again):
        agree(one, model, X)
        agree(one, model, X, other=True)
    with torch.no_grad():
        program = torch.export.export(folded, (X,)).module()
    agree(program, model, X)


def test_without_packing_the_norm_is_one_multiply_add():
    report = gb.fold(randomised(Block()), X, pack=False).fold_report
    assert [layer.outcome for layer in report.layers] == ["left", "left"]
