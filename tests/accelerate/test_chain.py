"""Chains: served past the modules' calls only while nobody can tell, and the same answer always."""

import copy
import pickle
import threading
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import gammabeta as gb
from gammabeta.accelerate.chain import Chain
from gammabeta.accelerate.packed import unavailable
from gammabeta.train.network import DigitNetwork

pytestmark = pytest.mark.skipif(bool(unavailable()), reason="this torch has no oneDNN")


class Straight(nn.Sequential):
    """Named layers, and a Sequential among them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.body = nn.Sequential(
            nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU()
        )
        self.flat = nn.Flatten()
        self.relu = nn.ReLU()
        self.drop = nn.Dropout()
        self.fc = nn.Linear(5 * 3 * 3, 7)


@pytest.fixture(scope="module")
def folded_once():
    torch.manual_seed(0)
    model = Straight()
    model(torch.randn(4, 4, 12, 12))
    return gb.fold(model.eval(), torch.randn(2, 4, 12, 12))


@pytest.fixture
def folded(folded_once):
    return copy.deepcopy(folded_once)


@pytest.fixture
def x():
    return torch.randn(3, 4, 12, 12)


@contextmanager
def calls_of(model):
    """Collect the calls of the model that its chain leaves to it."""
    made = []

    def call(*args, **kwargs):
        made.append(args)
        return type(model)._call_impl(model, *args, **kwargs)

    vars(model)["_call_impl"] = call
    try:
        yield made
    finally:
        del vars(model)["_call_impl"]


def _plain(model, *args, **kwargs):
    return type(model)._call_impl(model, *args, **kwargs)


def _assert_served(model, x):
    with torch.no_grad(), calls_of(model) as made:
        assert torch.equal(model(x), _plain(model, x))
    assert made == []


def test_the_layers_are_called_directly(folded, x):
    assert type(folded) is Straight
    _assert_served(folded, x)
    _assert_served(folded, x[:1].contiguous(memory_format=torch.channels_last))
    with torch.inference_mode(), calls_of(folded) as made:
        folded(x)
    assert made == []
    digits = gb.fold(DigitNetwork().eval(), torch.randn(2, 1, 28, 28))
    _assert_served(digits, torch.randn(1, 1, 28, 28))
    assert digits.trace(torch.randn(1, 1, 28, 28))["flat"] == (1, 800)


def test_a_chain_hangs_on_the_outermost_module_that_is_one():
    body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.short = body, nn.Conv2d(4, 4, 5)

        def forward(self, x):
            return self.body(x) + self.short(x)

    model = gb.fold(nn.Sequential(Twice(), nn.Flatten()).eval(), torch.randn(2, 4, 9, 9))
    hung = [name for name, module in model.named_modules() if "_compiled_call_impl" in vars(module)]
    assert hung == ["0.body"]
    _assert_served(model[0].body, torch.randn(2, 4, 9, 9))
    again = gb.fold(nn.Sequential(model[0].body, nn.Flatten(), nn.Linear(100, 200)), torch.randn(2, 4, 9, 9))
    assert not isinstance(again[0]._compiled_call_impl, Chain)  # the outer one has taken its place
    _assert_served(again, torch.randn(2, 4, 9, 9))
    _assert_served(model[0].body, torch.randn(2, 4, 9, 9))


def test_gradients_are_those_of_the_plain_call(folded, x):
    upstream, found = torch.randn(3, 7), []
    for call in (folded, folded._call_impl):
        given = x.clone().requires_grad_()
        folded.zero_grad()
        (call(given) * upstream).sum().backward()
        found.append([given.grad, *(p.grad.clone() for p in folded.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda *_: seen.append(1)),
    "pre": lambda m, seen: m.register_forward_pre_hook(lambda *_: seen.append(1)),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda *_: seen.append(1)),
}


@pytest.mark.parametrize("path", ["", "bn", "conv", "body", "body.1", "drop", "fc"])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_on_any_module_is_called(folded, x, kind, path):
    _assert_served(folded, x)
    seen = []
    handle = HOOKS[kind](folded.get_submodule(path), seen)
    folded(x.requires_grad_()).sum().backward()
    assert seen == [1]
    handle.remove()
    _assert_served(folded, x.detach())


def test_a_hook_on_all_modules_is_called(folded, x):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    with torch.no_grad():
        folded(x)
    handle.remove()
    assert seen[-1] == "Straight"
    assert "Identity" in seen
    _assert_served(folded, x)


def _replace(model):
    model.body[1] = nn.AvgPool2d(2)


def _append(model):
    model.body.append(nn.Tanh())


def _retype(model):
    class Doubled(nn.Identity):
        def forward(self, x):
            return 2 * x

    model.bn.__class__ = Doubled


def _parametrize(model):
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    parametrize.register_parametrization(model.conv, "weight", Halved())
    parametrize.register_parametrization(model.fc, "bias", Halved())


@pytest.mark.parametrize("change", [_replace, _append, _retype, _parametrize])
def test_a_change_of_the_modules_is_seen(folded, x, change):
    with torch.no_grad():
        before = folded(x)
        change(folded)
        assert not torch.equal(folded(x), before)
    _assert_served(folded, x)


@torch.no_grad()
def test_pruning_is_seen(folded, x):
    before = folded(x)
    prune.l1_unstructured(folded.conv, "weight", 0.5)
    prune.l1_unstructured(folded.conv, "bias", 0.5)
    after = folded(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, _plain(folded, x))


@torch.no_grad()
def test_what_is_put_over_a_module_s_call_is_called(folded, x, monkeypatch):
    wanted = _plain(folded, x)
    monkeypatch.setitem(vars(folded.bn), "forward", lambda x: 2 * x)
    assert not torch.equal(folded(x), wanted)
    monkeypatch.undo()
    folded.body.compile(backend="eager")
    with calls_of(folded) as made:
        assert torch.allclose(folded(x), wanted, rtol=1e-5, atol=1e-6)  # by torch's operators
    assert len(made) == 1
    vars(folded.body).pop("_compiled_call_impl")
    seen, call = [], nn.Module.__call__
    monkeypatch.setattr(nn.Module, "__call__", lambda m, *args: seen.append(m) or call(m, *args))
    assert torch.equal(folded(x), wanted)
    assert folded.drop in seen


@torch.no_grad()
def test_training_mode_and_settings_are_read_at_each_call(folded, x):
    before = folded(x)
    torch.manual_seed(1)
    trained = folded.train()(x)
    torch.manual_seed(1)
    assert torch.equal(trained, _plain(folded, x))
    assert not torch.equal(trained, before)
    folded.eval().body[1].stride = 1
    with pytest.raises(RuntimeError, match="shapes"):  # 8x8 pixels arrive at the Linear
        folded(x)


class Watching(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        Watching,
        lambda: FlopCounterMode(display=False),
        lambda: torch.autograd.forward_ad.dual_level(),
    ],
    ids=["autocast", "function mode", "dispatch mode", "forward AD"],
)
@torch.no_grad()
def test_a_call_that_somebody_watches_is_the_model_s(folded, x, context):
    with calls_of(folded) as made, context():
        found = folded(x)
        assert torch.equal(found, _plain(folded, x))
    assert len(made) == 1


@torch.no_grad()
def test_a_call_that_is_not_one_plain_tensor_is_the_model_s(folded, x):
    with calls_of(folded) as made:
        assert torch.equal(folded(input=x), _plain(folded, x))
        folded(nn.Parameter(x))
        with pytest.raises(TypeError, match="forward"):
            folded(x, x)
    assert len(made) == 3


@torch.no_grad()
def test_tracers_meet_the_children(folded, x):
    outer = nn.Sequential(folded)
    graph = torch.fx.symbolic_trace(outer)
    assert "0.body.1" in [node.target for node in graph.graph.nodes if node.op == "call_module"]
    exported = torch.export.export(outer, (x,)).module()
    compiled = torch.compile(outer, backend="eager", fullgraph=True)
    wanted = _plain(folded, x)
    for program in (graph, exported, compiled):
        assert (program(x) - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@torch.no_grad()
def test_a_copy_has_a_chain_of_its_own(folded, x, tmp_path):
    wanted = folded(x)
    torch.save(folded, tmp_path / "m.pt")
    copies = [
        copy.deepcopy(folded),
        pickle.loads(pickle.dumps(folded)),
        torch.load(tmp_path / "m.pt", weights_only=False),
    ]
    folded.fc.weight.zero_()
    for other in copies:
        assert other._compiled_call_impl.module is other
        assert torch.equal(other(x), wanted)
        _assert_served(other, x)
    shallow = copy.copy(folded)
    shallow.double()
    assert shallow(x.double()).dtype is torch.float64


def test_several_threads(folded, x):
    with torch.no_grad():
        wanted = _plain(folded, x)
    folded._compiled_call_impl.layers = None
    wrong = []

    def work():
        with torch.no_grad():
            wrong.extend(i for i in range(20) if not torch.equal(folded(x), wanted))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Which modules are chains -----------------------------------------------------------------------------------


def _chains(model):
    return [name for name, module in model.named_modules() if isinstance(module._compiled_call_impl, Chain)]


def _body():
    return [nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(100, 200)]


class Written(nn.Module):
    """A forward of its own, that does what a Sequential does."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.body = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Sequential(*_body())

    def forward(self, x):
        return self.body(self.norm(self.conv(x)))


class Doubled(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


class Reversed(nn.Sequential):
    def __iter__(self):
        return iter(list(self._modules.values())[::-1])


@torch.no_grad()
def test_a_forward_of_its_own_is_called_and_its_layers_are_packed():
    x = torch.randn(2, 4, 9, 9)
    folded = gb.fold(Written().eval(), x)
    assert _chains(folded) == ["body"]
    assert folded.fold_report.packed == ("conv", "body.0", "body.2", "body.5")
    _assert_served(folded.body, folded.conv(x))
    doubled = gb.fold(Doubled(*_body()).eval(), x)
    assert _chains(doubled) == []
    assert torch.equal(doubled(x), 2 * nn.Sequential.forward(doubled, x))


@torch.no_grad()
def test_an_order_of_its_own_is_kept():
    x = torch.randn(2, 4, 9, 9)
    folded = gb.fold(Reversed(*_body()[3::-1]).eval(), x)
    assert _chains(folded) == []
    assert folded(x).shape == (2, 4, 5, 5)


@torch.no_grad()
def test_a_module_that_stands_twice_is_called_twice():
    double = nn.Linear(128, 128)
    model = gb.fold(nn.Sequential(double, nn.Tanh(), double, nn.Tanh()).eval(), torch.randn(2, 128))
    assert _chains(model) == [""]
    _assert_served(model, torch.randn(3, 128))


@torch.no_grad()
def test_a_layer_that_is_missing_is_torch_s_error(folded, x):
    folded.body.register_module("2", None)
    with pytest.raises(TypeError, match="NoneType"):
        folded(x)


@torch.no_grad()
def test_the_digit_network_is_a_chain():
    folded = gb.fold(DigitNetwork().eval(), torch.randn(2, 1, 28, 28))
    assert _chains(folded) == [""]
    assert len(folded._compiled_call_impl.layers.steps) == 5  # two convolutions, flatten, two Linears
