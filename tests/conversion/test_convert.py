"""A converted model: same outputs, gradients and state dict; fused where it is safe and nowhere else."""

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.utils._pytree import tree_leaves

import gammabeta as gb


class Basic(nn.Module):
    """torchvision's residual block: one ReLU used twice, ``+=``, the shortcut computed after the branch."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ConvBlock(nn.Module):
    def __init__(self, c_in, c_out, activate=True):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(c_out)
        self.activate = activate
        if activate:
            self.activ = nn.ReLU6(inplace=True)

    def forward(self, x):
        x = self.bn(self.conv(x))
        if self.activate:
            x = self.activ(x)
        return x


class Unit(nn.Module):
    """The addition stands two modules away from the batch norm it follows."""

    def __init__(self, c):
        super().__init__()
        self.body = nn.Sequential(ConvBlock(c, c), ConvBlock(c, c, activate=False))
        self.activ = nn.ReLU(inplace=True)

    def forward(self, x):
        identity = x
        x = self.body(x)
        x = x + identity
        return self.activ(x)


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.AvgPool2d(2)
        )
        self.blocks = nn.Sequential(Basic(8, 8), Basic(8, 12), Unit(12))
        self.bn = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 6)
        self.bn1d = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        x = F.avg_pool2d(F.relu(self.bn(x)), 2).mean((2, 3))
        return self.drop(self.bn1d(self.fc(x)).relu_())


def randomised(model):
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) * 0.5 + 0.2)
    return model


def step(model, x, training):
    """Output, gradients and state after one step with a random upstream gradient."""
    model.train(training)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    leaf = x.clone().requires_grad_()
    out = model(leaf)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(5)))
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return out.detach(), leaf.grad, grads, {k: v.clone() for k, v in model.state_dict().items()}


def same(model, converted, x):
    """Compare both, the one given first on a copy, as they share their buffers."""
    for training in (True, False):
        expected = step(copy.deepcopy(model), x, training)
        found = step(copy.deepcopy(converted), x, training)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def fused_in(model):
    return {change.layer: change.fused for change in model.conversion_report.changes if change.fused}


X = (4, 3, 16, 16)


def test_whole_model():
    model = randomised(Whole())
    converted = gb.convert(model, to="fused", example=torch.randn(X))
    assert fused_in(converted) == {
        "stem.1": "silu + 2x2 mean pool",
        "blocks.0.bn1": "relu",
        "blocks.0.bn2": "residual + relu",
        "blocks.1.bn1": "relu",
        "blocks.1.bn2": "residual + relu",
        "blocks.2.body.0.bn": "relu6",
        "blocks.2.body.1.bn": "residual + relu",
        "bn": "relu + 2x2 mean pool",
        "bn1d": "relu",
    }
    assert list(converted.state_dict()) == list(model.state_dict())
    assert isinstance(converted, Whole)
    assert isinstance(converted.blocks[0], Basic)
    same(model, converted, torch.randn(X))
    assert all(a is b for a, b in zip(model.parameters(), converted.parameters(), strict=True))
    assert type(model.stem[1]) is nn.BatchNorm2d


class WithNumbers(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.leaky = nn.LeakyReLU(0.2, inplace=True)
        self.act = nn.GELU("tanh")

    def forward(self, x):
        x = self.leaky(self.bn1(x))
        x = F.hardtanh(self.bn2(x), -2.0, 1.5)
        return self.act(self.bn3(x) + x).tanh()


def test_activations_with_numbers():
    model = randomised(WithNumbers())
    converted = gb.convert(model, example=torch.randn(X))
    assert fused_in(converted) == {
        "bn1": "leaky_relu(0.2)",
        "bn2": "hardtanh(-2.0, 1.5)",
        "bn3": "residual + gelu_tanh",
    }
    same(model, converted, torch.randn(X))
    for one in (model, converted):
        one.leaky.negative_slope = 0.7  # a call asks for the slope as it is
    same(model, converted, torch.randn(X))


def test_there_and_back():
    model = randomised(Whole())
    for kind in ("fused", "ghost", "frozen"):
        back = gb.convert(gb.convert(model, to=kind), to="torch")
        assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
        assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in model.parameters()]
        assert repr(back) == repr(model)
        same(model, back, torch.randn(X))


def test_copies_pickles_traces_and_compiles():
    model = randomised(Whole()).eval()
    converted = gb.convert(model)
    x = torch.randn(X)
    expected = model(x)
    for twin in (
        copy.deepcopy(converted),
        pickle.loads(pickle.dumps(converted)),
        torch.fx.symbolic_trace(converted),
    ):
        torch.testing.assert_close(twin(x), expected, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(converted, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
    program = torch.export.export(converted, (x,))
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)
    if hasattr(torch.compiler, "is_exporting"):  # PyTorch 2.6 does not tell that torch.export traces
        assert not any("gammabeta" in str(node.target) for node in program.graph.nodes)


def block(forward):
    """A module around one batch norm, a convolution and what else the cases below need."""

    class Case(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.bn = nn.BatchNorm2d(3)
            self.other = nn.BatchNorm2d(3)
            self.relu = nn.ReLU()
            self.relu_ = nn.ReLU(inplace=True)
            self.learned = nn.PReLU()
            self.pool3 = nn.AvgPool2d(3)
            self.calls = 0

    Case.forward = forward
    return randomised(Case())


def used_twice(self, x):
    y = self.bn(x)
    return self.relu(y) + y


def output_and_activation(self, x):
    y = self.bn(x)
    return F.relu(y), y


def identity_changed_between(self, x):
    y = self.conv(x)
    z = self.bn(y)
    y.mul_(2)
    return z.relu() + y


def input_changed_between(self, x):
    y = x * 1
    z = self.bn(y)
    y.add_(1)
    return self.relu(z) * y.mean()


def residual_is_the_one_changed(self, x):
    y = x * 1
    y += self.bn(x)
    return y.relu()


def learned_slope(self, x):
    return self.learned(self.bn(x))


def learned_slope_by_name(self, x):
    return F.prelu(self.bn(x), self.learned.weight)


def learned_slope_of_a_sum(self, x):
    return self.learned(self.bn(x) + x)


def slope_changed_after_it_was_used(self, x):
    y = self.learned(self.bn(x))
    self.learned.weight.data.mul_(0.5)
    return self.conv(y) + y


def pooled_after_a_learned_slope(self, x):
    return F.avg_pool2d(self.learned(self.bn(x)), 2)


def other_pool(self, x):
    return self.pool3(self.bn(x))


def mode_dependent(self, x):
    return self.relu(self.bn(x)) if self.training else self.bn(x).relu() * 1


def draws_numbers(self, x):
    return self.relu(self.bn(x)) * (1 if random.random() < 2 else 0)


def depends_on_values(self, x):
    y = self.bn(x)
    return self.relu(y) if y.sum() > -1e9 else y


def counts_calls(self, x):
    self.calls += 1
    return self.relu(self.bn(x))


def without_gradient(self, x):
    with torch.no_grad():
        y = self.conv(x)
    return self.relu(self.bn(y))


@torch.no_grad()
def decorated(self, x):
    return self.relu(self.bn(x))


def full_precision(self, x):
    with torch.autocast("cpu", enabled=False):
        return self.relu(self.bn(x))


def checkpointed(self, x):
    return self.relu(torch.utils.checkpoint.checkpoint(self.bn, x, use_reentrant=False))


def checkpointed_reentrant(self, x):
    return self.relu(torch.utils.checkpoint.checkpoint(self.bn, x, use_reentrant=True))


def scaled_addition(self, x):
    return torch.add(self.bn(x), x, alpha=2)


def activation_of_a_product(self, x):
    return self.relu(self.bn(x) * 2)


def broadcast_residual(self, x):
    return F.relu(self.bn(x) + self.conv(x).mean((2, 3), keepdim=True))


def residual_is_a_number(self, x):
    return F.silu(self.bn(x) + x.size(0))


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (used_twice, {}),
        (output_and_activation, {}),
        (identity_changed_between, {"bn": "relu"}),
        (input_changed_between, {}),
        (residual_is_the_one_changed, {}),
        (learned_slope, {"bn": "prelu"}),
        (learned_slope_by_name, {"bn": "prelu"}),
        (learned_slope_of_a_sum, {"bn": "residual"}),
        (pooled_after_a_learned_slope, {"bn": "prelu"}),
        (slope_changed_after_it_was_used, {"bn": "prelu"}),
        (other_pool, {}),
        (depends_on_values, {}),
        (broadcast_residual, {}),
        (residual_is_a_number, {}),
        (decorated, {}),
        (checkpointed, {}),
        (checkpointed_reentrant, {}),
        (scaled_addition, {}),
        (activation_of_a_product, {}),
    ],
)
def test_left_where_it_is_not_safe(forward, expected):
    model = block(forward)
    converted = gb.convert(model)
    found = fused_in(converted)
    if forward is identity_changed_between:
        # Only up to the activation, or not at all: the convolution's output changes under the batch norm.
        assert found in ({}, expected)
    else:
        assert found == expected
    assert type(converted.bn) is gb.nn.BatchNorm2d
    for training in (True, False):
        x = torch.randn(2, 3, 6, 6, requires_grad=True)
        expected_out = copy.deepcopy(model).train(training)(x.clone())
        found_out = copy.deepcopy(converted).train(training)(x.clone())
        torch.testing.assert_close(found_out, expected_out)
        for a, b in zip(tree_leaves(found_out), tree_leaves(expected_out), strict=True):
            assert a.requires_grad == b.requires_grad
    reasons = {c.layer: c.reason for c in converted.conversion_report.changes}
    assert found or reasons["bn"]


def shared(self, x):
    return self.relu(self.bn(self.conv(self.relu(self.bn(x)))))


def shared_and_bare(self, x):
    return self.bn(self.conv(self.relu(self.bn(x))))


def two_batch_norms_added(self, x):
    return self.relu_(self.bn(self.conv(x)) + self.other(x))


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (shared, {"bn": "relu"}),
        (shared_and_bare, {"bn": "relu"}),
        (two_batch_norms_added, {"bn": "residual + relu"}),
        (mode_dependent, {"bn": "relu"}),
        (draws_numbers, {"bn": "relu"}),
        (counts_calls, {"bn": "relu"}),
        (without_gradient, {"bn": "relu"}),
        (full_precision, {"bn": "relu"}),
    ],
)
def test_fused_and_right(forward, expected):
    model = block(forward)
    converted = gb.convert(model)
    assert fused_in(converted) == expected
    for training in (True, False):
        x = torch.randn(2, 3, 6, 6)
        a, b = copy.deepcopy(model).train(training), copy.deepcopy(converted).train(training)
        torch.testing.assert_close(b(x), a(x))
        torch.testing.assert_close(b.state_dict(), a.state_dict())


class Pooled(nn.Module):
    """A pooling two modules away from the batch norm whose activation it follows, and one beside."""

    def __init__(self, pool):
        super().__init__()
        self.init = nn.Sequential(ConvBlock(3, 8), pool)
        self.conv, self.bn = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x):
        return F.max_pool2d(F.relu(self.bn(self.conv(self.init(x)))), 2)


def test_max_pooling_is_fused():
    model = randomised(Pooled(nn.MaxPool2d(3, 2, 1)))
    converted = gb.convert(model, example=torch.randn(X))
    assert fused_in(converted) == {"init.0.bn": "relu6 + 3x3 max pool", "bn": "relu + 2x2 max pool"}
    same(model, converted, torch.randn(X))
    same(model, pickle.loads(pickle.dumps(converted)), torch.randn(X))
    back = gb.convert(converted, to="torch", example=torch.randn(X))
    assert not any(isinstance(m, gb.nn.BatchNorm2d) for m in back.modules())
    same(model, back, torch.randn(X))


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.MaxPool2d(2, 2, dilation=2),
        nn.MaxPool2d((3, 2)),
        nn.MaxPool2d(2, (2, 1)),
        nn.MaxPool2d(17, 1, 8),
        nn.AvgPool2d(3, 2, 1),
        nn.LPPool2d(2, 2),
    ],
)
def test_other_poolings_are_left(pool):
    model = randomised(Pooled(pool))
    converted = gb.convert(model)
    assert fused_in(converted) == {"init.0.bn": "relu6", "bn": "relu + 2x2 max pool"}
    same(model, converted, torch.randn(X))


def test_pooling_behind_two_activations_is_left():
    model = randomised(nn.Sequential(ConvBlock(3, 8), nn.SiLU(), nn.MaxPool2d(2)))
    converted = gb.convert(model)
    assert fused_in(converted) == {"0.bn": "relu6"}
    same(model, converted, torch.randn(X))


def test_hooks_are_respected():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    seen = []
    model[1].register_forward_hook(lambda m, i, o: seen.append(o.min().item()))
    converted = gb.convert(model)
    assert fused_in(converted) == {}
    converted(torch.randn(2, 3, 4, 4))
    assert seen[0] < 0


def test_a_hook_on_a_container_keeps_it_called():
    model = Unit(3)
    calls = []
    model.body.register_forward_hook(lambda *a: calls.append(1))
    converted = gb.convert(model)
    assert "body.1.bn" not in fused_in(converted)
    converted(torch.randn(2, 3, 4, 4))
    assert calls


@pytest.mark.parametrize("path", ["init.0", "init.0.bn", "init.0.activ", "init.1", "bn"])
def test_a_hook_registered_later_sees_what_it_saw(path):
    """On a layer that does more now, on one that is not called, on a container that is looked through."""
    model = randomised(Pooled(nn.MaxPool2d(3, 2, 1)))
    converted = gb.convert(model)
    assert len(fused_in(converted)) == 2
    x, seen = torch.randn(X), []
    for network in (model, converted):
        network.eval().get_submodule(path).register_forward_hook(lambda m, i, o: seen.append(o.clone()))
        network(x)
    torch.testing.assert_close(seen[0], seen[1])
    before = converted(x)
    converted.get_submodule(path)._forward_hooks.clear()
    torch.testing.assert_close(converted(x), before)


def test_another_module_in_the_place_of_one_that_was_fused_is_called():
    model = Unit(3).eval()
    converted = gb.convert(model)
    assert fused_in(converted)
    x = torch.randn(2, 3, 6, 6)
    copied = pickle.loads(pickle.dumps(converted))
    for network in (model, converted, copied):
        network.activ = nn.Tanh()
    torch.testing.assert_close((converted(x), copied(x)), (model(x), model(x)))


@pytest.mark.parametrize("change", ["another", "setting"])
def test_one_of_the_same_class_with_other_settings_is_noticed(change):
    model = randomised(Pooled(nn.MaxPool2d([3, 3], 2, 1))).eval()
    converted = gb.convert(model)
    assert "init.0.bn" in fused_in(converted)
    for network in (model, converted):
        if change == "another":
            network.init[1] = nn.MaxPool2d(2)
        else:
            network.init[1].padding = 0
    x = torch.randn(X)
    torch.testing.assert_close(converted(x), model(x))


def test_parts_still_mean_what_they_meant():
    model = randomised(Unit(3)).eval()
    converted = gb.convert(model)
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(converted.body(x), model.body(x))
    torch.testing.assert_close(converted.body[1](x), model.body[1](x))


def test_a_part_of_a_sequential_is_a_plain_one():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    x = torch.randn(2, 3, 5, 5)
    fused = gb.convert(model)
    assert fused[1] is next(m for m in fused.modules() if isinstance(m, gb.nn.BatchNorm2d))
    for part in (slice(0, 2), slice(1, 3), slice(2, None), slice(None)):
        assert type(fused[part]) is nn.Sequential
        given = fused[: part.start or 0](x)
        torch.testing.assert_close(fused[part](given), model[part](given))


def test_lone_layer_shared_layer_and_own_class():
    assert type(gb.convert(nn.BatchNorm3d(4))) is gb.nn.BatchNorm3d
    bn = nn.BatchNorm1d(4)
    converted = gb.convert(nn.ModuleDict({"a": bn, "b": nn.ModuleList([bn])}))
    assert converted["a"] is converted["b"][0]

    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    converted = gb.convert(nn.Sequential(Own(3), nn.ReLU()))
    assert type(converted[0]) is Own
    assert "class of its own" in converted.conversion_report.changes[0].reason


def test_settings_of_our_own_layers_survive():
    model = nn.Sequential(gb.nn.BatchNorm2d(3, activation="relu", pool=2), nn.Conv2d(3, 3, 1))
    randomised(model)
    for kind in ("ghost", "fused"):
        assert gb.convert(model, to=kind)[0].activation == "relu"
    plain = gb.convert(model, to="torch")
    assert type(plain[0]) is nn.BatchNorm2d
    same(model, plain, torch.randn(X))


def test_kinds():
    model = randomised(Whole())
    frozen = gb.convert(model, to="frozen").train()
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    frozen(torch.randn(X)).sum().backward()
    torch.testing.assert_close(dict(frozen.state_dict()), before, rtol=0, atol=0)
    assert frozen.bn.weight.data_ptr() == model.bn.weight.data_ptr()
    assert model.bn.weight.requires_grad
    assert not frozen.bn.weight.requires_grad
    assert model.bn.training
    ghost = gb.convert(model, to="ghost")
    assert isinstance(ghost.bn, gb.nn.GhostBatchNorm2d)
    assert ghost.bn.virtual_batch_size == 32
    no_statistics = gb.convert(nn.BatchNorm2d(3, track_running_stats=False), to="frozen")
    assert type(no_statistics) is nn.BatchNorm2d
    with pytest.raises(gb.errors.UsageError, match="fused"):
        gb.convert(model, to="faster")


def test_lazy_layers():
    model = nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d(), nn.ReLU())
    converted = gb.convert(model)
    assert type(converted[1]) is gb.nn.LazyBatchNorm2d
    converted(torch.randn(2, 3, 4, 4))
    assert type(converted[1]) is gb.nn.BatchNorm2d
    assert fused_in(converted) == {}
    assert fused_in(gb.convert(converted)) == {"1": "relu"}


def test_failure_leaves_the_model_alone():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(gb.errors.SurgeryError, match="example"):
        gb.convert(model, example=torch.randn(2, 5, 4, 4))
    assert type(model[1]) is nn.BatchNorm2d
    torch.testing.assert_close(model.state_dict(), state)
    model.stream = iter([])
    model.lock = (i for i in range(2))
    with pytest.raises(gb.errors.SurgeryError, match="cannot be copied"):
        gb.convert(model)


def test_report():
    report = gb.convert(Whole()).conversion_report
    text = str(report)
    assert "blocks.2.body.1.bn" in text
    assert "residual + relu" in text
    assert "10 batch norms: 10 changed class, 9 compute what follows them" in text
    data = report.to_dict()
    assert data["to"] == "fused"
    assert {c["where"] for c in data["changes"] if c["fused"]} >= {"", "stem", "blocks.2"}
    # Version 0.1.0 called it folded.
    assert all(c["folded"] == c["fused"] for c in data["changes"])
    assert [change.folded for change in report.changes] == [change.fused for change in report.changes]


def test_optimiser_made_before_trains_the_converted_model():
    model = randomised(Whole())
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    converted = gb.convert(model)
    before = converted.bn.weight.clone()
    converted(torch.randn(X)).square().sum().backward()
    optimiser.step()
    assert not torch.equal(converted.bn.weight, before)


def _extend_in_place(model: nn.Sequential) -> None:
    model += nn.Sequential(nn.Tanh())


CHANGES: list[Callable[[nn.Sequential], Any]] = [
    lambda model: model.append(nn.Tanh()),
    lambda model: model.insert(0, nn.Tanh()),
    lambda model: model.extend([nn.Tanh()]),
    lambda model: model.pop(2),
    lambda model: model.__delitem__(2),
    lambda model: model.__setitem__(2, nn.Tanh()),
    lambda model: model.__setitem__(1, nn.Identity()),
    _extend_in_place,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_sequential_that_is_changed_does_what_stands_in_it(change: Callable[[nn.Sequential], Any]) -> None:
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    fused, x = gb.convert(plain, to="fused"), torch.randn(2, 3, 8, 8)
    assert type(fused) is not nn.Sequential
    change(plain)
    change(fused)
    assert len(fused) == len(plain)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)
