"""Folding: every case, the original untouched, and whatever is wrong taken back."""

import copy
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gammabeta as gb
from gammabeta.errors import SurgeryError, UsageError
from gammabeta.folding.affine import Affine, NotExactError, Operation, fold_after, fold_before
from gammabeta.folding.layers import ChannelAffine
from gammabeta.folding.verify import copied

_BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.insert(0, _BENCHMARKS)
try:
    import fold_cases
finally:
    sys.path.remove(_BENCHMARKS)

DTYPE_LIMIT = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def _norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _small(norm=None):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), norm or nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)
    )
    return fold_cases.randomised(model)


def _snapshot(model):
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "modules": [(name, type(m), m.training) for name, m in model.named_modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    }


def _same(before, after):
    assert before["modules"] == after["modules"]
    assert before["hooks"] == after["hooks"]
    assert before["state"].keys() == after["state"].keys()
    for name, tensor in before["state"].items():
        assert torch.equal(tensor.nan_to_num(), after["state"][name].nan_to_num()), name


#: Right, and not folded: their source does not surely show that every path leads through the pair.
NOT_CERTAIN = {
    "after Linear on (N, L, F), tokens flattened first",
    "after Linear on (N, L, F), transposed first",
    "functional F.batch_norm and F.conv2d",
    "fused module with activation and residual",
    "functional, in a forward torch.fx cannot trace",
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("case", fold_cases.CASES, ids=lambda case: case.name)
def test_case(case):
    model = case.build()
    if case.drawn:
        with torch.no_grad():
            fold_cases.randomised(model)
    model.train()  # a model in training mode folds as it would evaluate, and stays in training mode
    before = _snapshot(model)
    folded = gb.fold(model, torch.randn(case.shape).to(case.dtype))
    _same(before, _snapshot(model))

    report = folded.fold_report
    outcomes = tuple(layer.outcome for layer in report.layers)
    if case.name in NOT_CERTAIN:
        assert set(outcomes) <= {"left", "guarded"}
    else:
        assert outcomes == case.outcomes
    assert case.name in NOT_CERTAIN or case.reason in "; ".join(layer.reason for layer in report.layers)
    assert not any(module.training for module in folded.modules())
    for layer in report.folded:
        if ":" not in layer.name and layer.outcome == "folded":
            assert not isinstance(folded.get_submodule(layer.name), nn.modules.batchnorm._BatchNorm)

    # On an input the fold has not seen, of another batch size, against the truth in float64.
    x = torch.randn(case.shape[0] + 1, *case.shape[1:]).to(case.dtype)
    with torch.no_grad():
        wanted = copied(model).eval().double()(x.double())
        got = folded(x)
    for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (got, wanted)), strict=True):
        same = b.isnan() | ((a.double() - b).abs() <= DTYPE_LIMIT[case.dtype] * b.nan_to_num().abs().max())
        assert same.all()


def test_folded_norms_are_gone_and_left_ones_are_one_multiply_add():
    model = fold_cases.randomised(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU()))
    folded = gb.fold(model, torch.randn(2, 3, 9, 9))
    assert isinstance(folded[2], ChannelAffine)
    assert list(folded[2].state_dict()) == ["scale", "shift"]
    assert not _norms(gb.fold(_small(), torch.randn(2, 3, 9, 9)))


def test_a_fused_norm_that_stays_stays_fused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), gb.nn.BatchNorm2d(8, activation="relu", pool=2))
    folded = gb.fold(fold_cases.randomised(model), torch.randn(2, 3, 9, 9))
    assert isinstance(folded[2], gb.nn.BatchNorm2d)
    assert folded.fold_report.layers[0].outcome == "left"


def test_parameters_are_new_tensors():
    model = _small()
    folded = gb.fold(model, torch.randn(2, 3, 9, 9))
    mine = {p.data_ptr() for p in model.parameters()}
    assert not mine & {p.data_ptr() for p in folded.parameters()}


def test_report_as_table_and_json():
    report = gb.fold(_small(), torch.randn(2, 3, 9, 9)).fold_report
    data = json.loads(report.to_json())
    assert [layer["outcome"] for layer in data["layers"]] == ["folded", "folded"]
    assert data["layers"][0] == {"name": "1", "outcome": "folded", "into": "0", "how": "after", "reason": ""}
    assert data["evidence"] == "graph"
    assert 0 < data["error"] <= 1e-13
    assert 0 < data["native_error"] <= 1e-6
    lines = str(report).splitlines()
    assert lines[1].split() == ["1", "folded", "after", "0"]
    assert lines[-1].startswith("2 of 2 folded")


def test_a_wrong_fold_is_taken_back_and_the_others_stay(monkeypatch):
    apply_module = sys.modules["gammabeta.folding.apply"]  # the package's name for it is the function
    right = apply_module.fold_after

    def wrong(op, weight, bias, affine):
        weight, bias = right(op, weight, bias, affine)
        return (weight * 1.01, bias) if weight.shape[1] == 8 else (weight, bias)

    monkeypatch.setattr(apply_module, "fold_after", wrong)
    model, x = _small(), torch.randn(2, 3, 9, 9)
    folded = gb.fold(model, x)
    first, second = folded.fold_report.layers
    assert first.outcome == "folded"
    assert second.outcome == "taken back"
    assert "moved by" in second.reason
    assert folded.fold_report.error <= 1e-13
    assert (folded(x) - model.eval()(x)).abs().max() <= 1e-6 * model(x).abs().max()


def test_a_tolerance_nothing_meets_gives_the_model_back_unfolded():
    model, x = _small(), torch.randn(2, 3, 9, 9)
    folded = gb.fold(model, x, tolerance=1e-30)
    assert {layer.outcome for layer in folded.fold_report.layers} == {"taken back"}
    assert torch.equal(folded(x), model.eval()(x))


class _Raises(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        self.norm(self.conv(x))
        raise ArithmeticError("no")


class _Noisy(nn.Module):
    def forward(self, x):
        return x + next(self.noise)

    noise = iter(torch.randn(100))


def test_a_model_that_raises_is_left_as_it_was():
    model = _Raises()
    before = _snapshot(model)
    with pytest.raises(SurgeryError, match="does not run on the example: no"):
        gb.fold(model, torch.randn(2, 3, 9, 9))
    _same(before, _snapshot(model))


def test_a_model_that_cannot_be_copied_or_repeated_is_refused():
    model = nn.Linear(2, 2)
    model.kept = (model.weight * 2,)  # no leaf: cannot be deep-copied
    with pytest.raises(SurgeryError, match="cannot be copied"):
        gb.fold(model, torch.randn(2, 2))
    with pytest.raises(SurgeryError, match="different output for the same input"):
        gb.fold(_Noisy(), torch.randn(2, 2))


def test_an_example_with_a_history():
    x = torch.randn(2, 3, 9, 9, requires_grad=True) * 2
    assert len(gb.fold(_small(), x).fold_report.folded) == 2


@pytest.mark.parametrize("example", [3, "x", {1: torch.ones(2)}])
def test_an_example_of_the_wrong_kind(example):
    with pytest.raises(UsageError, match="example must be"):
        gb.fold(_small(), example)


def test_tolerance_must_be_positive():
    with pytest.raises(UsageError, match="tolerance"):
        gb.fold(_small(), torch.randn(2, 3, 9, 9), tolerance=0)


class _TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.table = nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.Embedding(10, 4)

    def forward(self, tokens, *, gain=None):
        y = self.norm(self.conv(self.table(tokens).transpose(1, 2)))
        return {"y": y if gain is None else y * gain, "again": [y.mean()]}


def test_arguments_by_keyword_integers_and_nested_outputs():
    model = fold_cases.randomised(_TwoInputs())
    tokens = torch.randint(0, 10, (2, 7))
    for example in (tokens, (tokens,), {"tokens": tokens, "gain": torch.rand(1)}):
        folded = gb.fold(model, example)
        assert [layer.outcome for layer in folded.fold_report.layers] == ["folded"]
    given = model.eval()(tokens)["y"]
    assert (folded(tokens)["y"] - given).abs().max() <= 1e-6 * given.abs().max()


def test_the_flow_is_the_example_s_where_fx_does_not_trace():
    class Shaped(nn.Sequential):
        def forward(self, x):
            if x.shape[-1] > 100:
                raise ValueError("too large")
            return super().forward(x)

    model = fold_cases.randomised(Shaped(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    report = gb.fold(model, torch.randn(2, 3, 9, 9)).fold_report
    assert report.evidence == "example"
    assert report.layers[0].outcome == "left"  # its own forward may end before the norm


def test_order_of_registration_does_not_matter():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_b, self.norm_a = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
            self.b, self.a = nn.Conv2d(8, 8, 3), nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return self.norm_a(self.b(torch.relu(self.norm_b(self.a(x)))))

    layers = gb.fold(fold_cases.randomised(Backwards()), torch.randn(2, 3, 9, 9)).fold_report.layers
    assert {layer.name: layer.into for layer in layers} == {"norm_b": "a", "norm_a": "b"}


def test_a_value_kept_by_a_closure_is_seen():
    kept = []

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x):
            y = self.conv(x)
            kept.append(y)
            return self.norm(y)

    report = gb.fold(Keeps(), torch.randn(2, 3, 9, 9)).fold_report
    assert "kept after the forward" in report.layers[0].reason


def test_an_in_place_change_between_is_seen():
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x):
            y = self.conv(x)
            y[:, 0] += 1  # through a view
            return self.norm(y)

    model, x = fold_cases.randomised(Adds()), torch.randn(2, 3, 9, 9)
    folded = gb.fold(model, x)
    assert folded.fold_report.layers[0].outcome == "left"
    assert torch.allclose(folded(x), model.eval()(x), rtol=1e-5, atol=1e-5)


def test_the_folded_model_pickles_traces_and_exports(tmp_path):
    model, x = _small(gb.nn.BatchNorm2d(8, activation="relu")), torch.randn(2, 3, 9, 9)
    folded = gb.fold(model, x)
    y = folded(x)
    assert torch.equal(pickle.loads(pickle.dumps(folded))(x), y)
    assert torch.equal(copy.deepcopy(folded)(x), y)
    assert torch.equal(torch.fx.symbolic_trace(folded)(x), y)
    assert torch.equal(torch.export.export(folded, (x,)).module()(x), y)
    again = gb.fold(folded, x)  # folding twice finds nothing more
    assert again.fold_report.layers == ()
    assert torch.equal(again(x), y)


def test_a_batch_norm_alone_is_its_own_multiply_add():
    model, x = fold_cases.randomised(nn.BatchNorm1d(5)), torch.randn(3, 5)
    folded = gb.fold(model, x)
    assert isinstance(folded, ChannelAffine)
    assert folded.fold_report.layers[0].outcome == "left"
    assert torch.allclose(folded(x), model.eval()(x), rtol=1e-6, atol=1e-6)


def test_a_large_mean_and_a_small_variance():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with torch.no_grad():
        model[0].bias.fill_(1e4)
        model[0].weight.mul_(1e-2)
        model[1].running_mean.fill_(1e4)
        model[1].running_var.fill_(1e-4)
    report = gb.fold(model, torch.randn(2, 3, 9, 9)).fold_report
    # The original loses its digits to the mean; the fold cancels the mean in float64, and does not.
    assert report.layers[0].outcome == "folded"
    assert report.original_error > 1e-3
    assert report.native_error < 1e-5


SIZES = st.integers(1, 3)


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(["conv", "conv_transpose"]),
    spatial=st.integers(1, 3),
    groups=SIZES,
    per_in=SIZES,
    per_out=SIZES,
    kernel=SIZES,
    stride=SIZES,
    dilation=SIZES,
    padding=st.integers(0, 2),
    biased=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_the_algebra_holds_for_every_setting(
    kind, spatial, groups, per_in, per_out, kernel, stride, dilation, padding, biased, seed
):
    draw = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    settings_ = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    op = Operation(kind, spatial, settings_)
    inside, outside = groups * per_in, groups * per_out
    shape = (outside, per_in) if kind == "conv" else (inside, per_out)
    weight = random(*shape, *[kernel] * spatial)
    bias = random(outside) if biased else None
    x = random(2, inside, *[dilation * (kernel - 1) + 3 + padding] * spatial)
    view = (1, -1, *[1] * spatial)

    after = Affine(random(outside), random(outside))
    wanted = op.run(x, weight, bias) * after.scale.view(view) + after.shift.view(view)
    assert torch.allclose(op.run(x, *fold_after(op, weight, bias, after)), wanted, rtol=1e-9, atol=1e-9)

    before = Affine(random(inside), random(inside))
    wanted = op.run(x * before.scale.view(view) + before.shift.view(view), weight, bias)
    try:
        folded = fold_before(op, weight, bias, before)
    except NotExactError:
        # Said to be inexact: only where a border or a stride is.
        assert padding > 0 or kind == "conv_transpose"
        return
    assert torch.allclose(op.run(x, *folded), wanted, rtol=1e-9, atol=1e-9)


def test_fold_refuses_a_map_of_another_width():
    op = Operation("linear", 0)
    three = Affine(torch.ones(3).double(), torch.zeros(3).double())
    with pytest.raises(NotExactError, match="3 channels"):
        fold_after(op, torch.ones(4, 5), None, three)
    with pytest.raises(NotExactError, match="3 channels"):
        fold_before(op, torch.ones(4, 5), None, three)
