"""Chains: served past the modules' calls only while nobody can tell, and the same answer always."""

import copy
import pickle
import threading
from contextlib import contextmanager
from types import FunctionType

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import gammabeta as gb
from gammabeta.accelerate.chain import Chain
from gammabeta.accelerate.packed import unavailable
from gammabeta.graph.links import links_of
from gammabeta.train.network import DigitNetwork

pytestmark = pytest.mark.skipif(bool(unavailable()), reason="this torch has no oneDNN")


class Straight(nn.Module):
    """A network like those people write, with a Sequential inside."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.body = nn.Sequential(
            nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU()
        )
        self.drop = nn.Dropout()
        self.fc = nn.Linear(5 * 3 * 3, 7)

    def forward(self, x):
        """Map (N, 4, 12, 12) to (N, 7)."""
        x = self.body(self.bn(self.conv(x)))
        x = F.relu(torch.flatten(x, 1))
        return self.fc(self.drop(x))


@pytest.fixture
def folded():
    torch.manual_seed(0)
    model = Straight()
    model(torch.randn(4, 4, 12, 12))
    return gb.fold(model.eval(), torch.randn(2, 4, 12, 12))


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
        assert torch.equal(folded(x=x), _plain(folded, x))
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
    folded._compiled_call_impl.way = None
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


# What a forward tells ---------------------------------------------------------------------------------------


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.flag, self.scale = nn.ReLU(), nn.Tanh(), True, nn.Parameter(torch.ones(1))
        self.gone = None
        self.register_module("absent", None)

    def helper(self, x):
        return x


def _names(links):
    return [type(link).__name__ for link in links]


def _calls(self, x):
    return self.b(self.a(x))


def _methods(self, x):
    y = self.a(x).flatten(1)
    z = y.view(-1, 3).contiguous()
    return self.b(torch.reshape(z, (1, -1)))


def _functions(self, x):
    return F.relu(torch.nn.functional.relu(torch.flatten(self.a(x), start_dim=1)), inplace=True)


def _nothing(self, x):
    return x


@pytest.mark.parametrize(
    ("forward", "steps"),
    [
        (_calls, ["ReLU", "Tanh"]),
        (_methods, ["ReLU", "methodcaller", "methodcaller", "methodcaller", "_Later", "Tanh"]),
        (_functions, ["ReLU", "_Later", "_Later", "_Later"]),
        (_nothing, []),
    ],
)
def test_straight_code_is_followed(forward, steps):
    module = type("Model", (Parts,), {"forward": forward})()
    links = links_of(module)
    assert _names(links) == steps
    x = y = torch.randn(2, 3)
    for link in links:
        y = link(y)
    assert torch.equal(y, module(x))


def _branch(self, x):
    return self.a(x) if self.flag else x


def _truth(self, x):
    return x and self.a(x)


def _loop(self, x):
    for _ in range(2):
        x = self.a(x)
    return x


def _setting(self, x):
    return self.a(x).flatten(self.flag)


def _store(self, x):
    self.a = x
    return self.b(x)


def _parameter(self, x):
    return self.a(x) * self.scale


def _arithmetic(self, x):
    return self.a(x) * 2


def _method(self, x):
    return self.helper(self.a(x))


def _global(self, x):
    return relu(self.a(x))  # noqa: F821


_global = FunctionType(_global.__code__, {"relu": print}, "_global")


def _builtin(self, x):
    print(x)
    return self.a(x)


def _twice(self, x):
    return self.a(x) + self.b(x)


def _aside(self, x):
    self.b(x)
    return self.a(x)


def _earlier(self, x):
    self.a(x)
    return x


def _two(self, x):
    return self.a(x).view(self.b(x))


def _pair(self, x):
    return self.a(x), x


def _default(self, x, y=None):
    return self.a(x)


def _varied(self, *x):
    return self.a(x)


def _compared(self, x):
    return self.a(x).flatten(x is None)


def _negated(self, x):
    return self.a(x).flatten(not x)


def _closed(self, x):
    return (lambda: self.a(x))()


def _yielded(self, x):
    yield self.a(x)


def _tried(self, x):
    try:
        return self.a(x)
    finally:
        self.b(x)


def _missing(self, x):
    return self.absent(x)


def _wrapped():
    @torch.no_grad()
    def forward(self, x):
        return self.a(x)

    return forward


@pytest.mark.parametrize(
    "forward",
    [
        *(
            _branch,
            _truth,
            _loop,
            _setting,
            _store,
            _parameter,
            _arithmetic,
            _method,
            _global,
            _builtin,
            _twice,
        ),
        *(_aside, _earlier, _two, _pair, _default, _varied, _compared, _negated, _closed, _yielded, _tried),
        *(_missing, _wrapped()),
    ],
    ids=lambda function: function.__name__,
)
def test_code_that_leaves_a_doubt_is_not_followed(forward):
    assert links_of(type("Model", (Parts,), {"forward": forward})()) is None


def test_names_that_mean_something_else_are_not_followed():
    assert links_of(type("Model", (Parts,), {"forward": _calls})()) is not None
    assert (
        links_of(type("Model", (Parts,), {"forward": _calls, "a": property(lambda self: F.relu)})()) is None
    )
    assert links_of(type("Model", (Parts,), {"forward": _methods, "flatten": None})()) is None
    patched = type("Model", (Parts,), {"forward": _calls})()
    vars(patched)["a"] = F.relu
    assert links_of(patched) is None
    assert links_of(type("Several", (nn.Sequential,), {"__iter__": lambda self: iter(())})(nn.ReLU())) is None
    assert len(links_of(nn.Sequential(*2 * [nn.ReLU()]))) == 2
