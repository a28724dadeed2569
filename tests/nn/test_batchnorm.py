"""Our layers beside PyTorch's of the same name."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import gammabeta as gb
from gammabeta.epilogue import ACTIVATIONS, Epilogue


@pytest.fixture(autouse=True, params=["small", "kernels"])
def way(request, monkeypatch):
    """Every test twice: as small inputs go, and through the kernels."""
    if request.param == "kernels":
        for name in ("SMALL_TRAIN", "SMALL_EVAL"):
            monkeypatch.setattr(f"gammabeta.functional.step.{name}", [0, 0, 0])
    return request.param


SHAPES = {1: (16, 3), 2: (4, 3, 6, 7), 3: (3, 3, 4, 5, 2)}


def pair(dim, **settings):
    """Our layer and PyTorch's with the same random state."""
    ours = getattr(gb.nn, f"BatchNorm{dim}d")(3, **settings)
    for name in ("activation", "pool", "skip_nonfinite", "initialize"):
        settings.pop(name, None)
    theirs = getattr(torch.nn, f"BatchNorm{dim}d")(3, **settings)
    state = {
        name: torch.rand_like(value) + 0.5 if value.is_floating_point() else value
        for name, value in theirs.state_dict().items()
    }
    theirs.load_state_dict(state)
    ours.load_state_dict(state)
    return ours, theirs


def compare(ours, theirs, x, after=lambda y: y, residual=None):
    """Outputs, gradients under a random upstream, and state: all equal."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, residual) if t is not None]
    both = []
    for layer, call in (
        (ours, lambda: ours(*leaves)),
        (theirs, lambda: after(theirs(leaves[0]) + (leaves[1] if residual is not None else 0))),
    ):
        out = call()
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        inputs = [*leaves, *layer.parameters()]
        both.append([out, *torch.autograd.grad(out, inputs, upstream)])
    torch.testing.assert_close(both[0], both[1], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"affine": False},
        {"momentum": None},
        {"momentum": 0.37, "eps": 1e-2},
        {"track_running_stats": False},
    ],
)
def test_equals_torch(dim, settings, training):
    ours, theirs = pair(dim, **settings)
    ours.train(training), theirs.train(training)
    for _ in range(3):
        compare(ours, theirs, torch.randn(SHAPES[dim]))
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_what_follows(activation, training, way):
    if way == "kernels" and activation not in (None, "relu"):
        pytest.skip("the kernels of every activation are compared in tests/kernels")
    ours, theirs = pair(2, activation=activation, pool=2)
    ours.train(training), theirs.train(training)
    act = Epilogue(activation).apply
    compare(ours, theirs, torch.randn(4, 3, 7, 6), lambda y: F.avg_pool2d(act(y), 2))
    compare(
        ours,
        theirs,
        torch.randn(4, 3, 7, 6),
        lambda y: F.avg_pool2d(act(y), 2),
        residual=torch.randn(4, 3, 7, 6),
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_max_pool(training, form):
    ours, theirs = pair(2, activation="relu", pool=gb.functional.MaxPool(3, 2, 1))
    ours.train(training), theirs.train(training)
    x = torch.randn(4, 3, 9, 12).contiguous(memory_format=form)
    compare(ours, theirs, x, after=lambda y: F.max_pool2d(F.relu(y), 3, 2, 1))
    assert ours(x).is_contiguous(memory_format=form)
    assert "pool=MaxPool(kernel=3, stride=2, padding=1)" in repr(ours)
    assert pickle.loads(pickle.dumps(ours)).pool == ours.pool


@pytest.mark.parametrize("kind", ["Ghost", "Frozen", "Sync", "Lazy"])
def test_max_pool_in_the_other_kinds(kind):
    name = "SyncBatchNorm" if kind == "Sync" else f"{kind}BatchNorm2d"
    features = () if kind == "Lazy" else (3,)
    settings = {"virtual_batch_size": 2} if kind == "Ghost" else {}
    pooling, bare = (
        getattr(gb.nn, name)(*features, **settings, **more)
        for more in ({"activation": "relu", "pool": gb.functional.MaxPool(3, 2, 1)}, {})
    )
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(pooling(x), F.max_pool2d(F.relu(bare(x)), 3, 2, 1))


def test_nonfinite_batch_is_left_out_with_one_warning():
    ours, theirs = pair(2)
    before = copy.deepcopy(ours.state_dict())
    x = torch.randn(4, 3, 5, 5)
    x[1, 2, 3, 4] = float("inf")
    with pytest.warns(RuntimeWarning, match="non-finite"):
        ours(x)
    torch.testing.assert_close(ours.state_dict(), before, rtol=0, atol=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            ours(x)
    assert len(caught) == 1
    compare(ours, theirs, torch.randn(4, 3, 5, 5))


def test_nonfinite_batch_counts_where_torch_behaviour_is_asked_for():
    ours, _ = pair(2, skip_nonfinite=False)
    ours(torch.full((4, 3, 5, 5), float("inf")))
    assert not torch.isfinite(ours.running_mean).any()
    assert int(ours.num_batches_tracked) == 1


def test_first_batch_initialises():
    ours, _ = pair(2, initialize="first_batch")
    x = torch.randn(4, 3, 5, 5) * 3 + 2
    ours(x)
    torch.testing.assert_close(ours.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(ours.running_var, x.var((0, 2, 3), correction=1))
    ours(torch.zeros(4, 3, 5, 5))
    torch.testing.assert_close(ours.running_mean, 0.9 * x.mean((0, 2, 3)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_once(use_reentrant):
    ours, theirs = pair(2)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    checkpoint(ours, x, use_reentrant=use_reentrant).square().sum().backward()
    theirs(x)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    assert int(ours.num_batches_tracked) == 1


def test_copies_and_pickles():
    ours, theirs = pair(2, activation="silu", pool=2)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert repr(twin) == repr(ours)
        compare(twin, copy.deepcopy(theirs), torch.randn(4, 3, 6, 6), lambda y: F.avg_pool2d(F.silu(y), 2))


def test_symbolic_trace_sees_one_node():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), gb.nn.BatchNorm2d(3, activation="relu"))
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(traced.eval()(x), model.eval()(x))


def test_unknown_settings_are_refused():
    for settings in ({"activation": "nonsense"}, {"pool": 3}, {"initialize": "zeros"}):
        with pytest.raises(gb.errors.UsageError, match=next(iter(settings))):
            gb.nn.BatchNorm2d(3, **settings)
    with pytest.raises(gb.errors.UsageError, match="4D"):
        gb.nn.BatchNorm1d(3, pool=2)(torch.randn(4, 3, 5))
