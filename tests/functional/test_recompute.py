"""Outputs that are not kept for the backward pass: same gradients to the last bit, memory given back."""

import contextlib
import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import gammabeta as gb
from gammabeta.functional import recompute
from gammabeta.nn.layer import Fused


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """However small the input, the kernels take it."""
    for name in ("SMALL_TRAIN", "SMALL_EVAL"):
        monkeypatch.setattr(f"gammabeta.functional.step.{name}", [0, 0, 0])


class Block(nn.Module):
    """A residual block; ``shrink`` halves the image and normalises the shortcut."""

    def __init__(self, channels: int, wider: int, shrink: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, wider, 3, 2 if shrink else 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wider)
        self.conv2 = nn.Conv2d(wider, wider, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(wider)
        self.shortcut = nn.Conv2d(channels, wider, 1, 2, bias=False) if shrink else nn.Identity()
        self.bn3 = nn.BatchNorm2d(wider) if shrink else nn.Identity()

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.bn3(self.shortcut(x)))


def residual(ceil_mode=True):
    """With ``ceil_mode`` the pooling stays an operation of its own."""
    pool = nn.MaxPool2d(3, 2, 1, ceil_mode=ceil_mode)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), pool)
    blocks = [Block(8, 8, False), Block(8, 8, False), Block(8, 8, False), Block(8, 16, True)]
    return nn.Sequential(stem, *blocks, Block(16, 16, False), nn.Flatten(), nn.LazyLinear(5))


def windowed():
    return residual(ceil_mode=False)


def plain():
    act = [nn.ReLU(), nn.SiLU(), nn.GELU()]
    convs = [nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 7, 2), nn.Conv2d(7, 5, 1)]
    layers = [m for c, a in zip(convs, act, strict=True) for m in (c, nn.BatchNorm2d(c.out_channels), a)]
    return nn.Sequential(*layers, nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5))


def perceptron():
    inner = [m for n in (9, 11) for m in (nn.LazyLinear(n), nn.BatchNorm1d(n), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *inner, nn.Linear(11, 7), nn.BatchNorm1d(7), nn.Linear(7, 5))


class Dense(nn.Module):
    """Each unit reads what all before it made."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.head = nn.Linear(20, 5)

    def forward(self, x):
        x = self.conv0(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat((x, conv(F.relu(norm(x)))), 1)
        return self.head(x.mean((2, 3)))


NETWORKS = [residual, plain, perceptron, Dense]


def pair(make, dtype=torch.float32, form=torch.contiguous_format, to="fused"):
    """The converted network without recomputation, the same with it, and an input."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16, dtype=dtype).contiguous(memory_format=form)
    model = make().to(dtype)
    model(x)
    model = model.to(memory_format=form)
    return gb.convert(model, to), gb.convert(copy.deepcopy(model), to, recompute=True), x


def loss_of(model, x):
    out = model(x)
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)).sum()


def gradients(model, x, **kwargs):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(loss_of(model, x), [x, *parameters], **kwargs)


def same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.fixture(autouse=True)
def _the_forward_it_had():
    forward = Fused.forward
    yield
    Fused.forward = forward


def watch(model):
    """References to the batch norms' outputs, in the order they are made."""
    made, forward, layers = [], Fused.forward, {*model.modules()}

    def noting(layer, *args, **kwargs):  # a hook, or a forward of one layer's own, would have it called alone
        out = forward(layer, *args, **kwargs)
        if layer in layers:
            made.append(weakref.ref(out.untyped_storage()))
        return out

    Fused.forward = noting
    return made


def kept(made):
    gc.collect()
    return [ref() is not None for ref in made]


@pytest.mark.parametrize("make", NETWORKS)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("to", ["fused", "frozen"])
def test_gradients_are_the_same_to_the_last_bit(make, form, dtype, to):
    keeping, recomputing, x = pair(make, dtype, form, to)
    expected = gradients(keeping, x)
    assert any(g.abs().sum() > 0 for g in expected)
    same(gradients(recomputing, x), expected)
    same(recomputing.state_dict().values(), keeping.state_dict().values())


def test_behind_max_pooling_too():
    keeping, recomputing, x = pair(windowed)
    same(gradients(recomputing, x), gradients(keeping, x))


@pytest.mark.parametrize(
    ("make", "pooled", "recomputed"),
    [
        # Of twelve, two are kept: the third block's, third in a chain of sums, and the last of all.
        (residual, 1, 10),
        (windowed, 0, 10),
        (plain, 0, 3),
        (perceptron, 0, 2),
        (Dense, 0, 2),
    ],
)
def test_outputs_are_gone_after_the_forward_pass(make, pooled, recomputed):
    for model, expected in zip(pair(make)[:2], (pooled, recomputed), strict=True):
        made = watch(model)
        out = model(torch.randn(4, 3, 16, 16))
        assert kept(made).count(False) == expected
        del out


def test_nothing_is_left_after_the_backward_pass():
    _, model, x = pair(residual)
    made = watch(model)
    gradients(model, x)
    assert not any(kept(made))


def test_max_pooling_needs_only_the_shape(monkeypatch):
    model, _, x = pair(residual)
    expected = gradients(model, x)
    poison = torch.full
    monkeypatch.setattr(
        torch, "empty_strided", lambda size, stride, dtype: poison(size, torch.nan, dtype=dtype)
    )
    same(gradients(model, x), expected)
    monkeypatch.setattr(recompute, "_only_shape_matters", lambda: False)
    made = watch(model)
    out = model(x)
    assert all(kept(made)), "a torch that reads the values gets them"
    assert out.requires_grad


def test_a_pool_that_is_not_read_says_so():
    recompute._only_shape_matters.cache_clear()
    assert recompute._only_shape_matters()


def test_the_graph_can_be_kept_and_used_again():
    keeping, model, x = pair(residual)
    expected = gradients(keeping, x)
    leaf = x.clone().requires_grad_()
    loss = loss_of(model, leaf)
    inputs = [leaf, *model.parameters()]
    same(torch.autograd.grad(loss, inputs, retain_graph=True), expected)
    same(torch.autograd.grad(loss, inputs), expected)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, inputs)


def test_forwards_before_their_backwards():
    keeping, model, x = pair(residual)
    for m in (keeping, model):
        sum(loss_of(m, x * k) for k in (1, 2)).backward()
    same([p.grad for p in model.parameters()], [p.grad for p in keeping.parameters()])


def test_second_derivatives():
    keeping, model, x = pair(plain)

    def penalty(m):
        found = gradients(m, x, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in found), [*m.parameters()][:-1])
        assert all(g.abs().sum() > 0 for g in second)
        return second

    same(penalty(model), penalty(keeping))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    keeping, model, x = pair(residual)
    expected = gradients(keeping, x)
    leaf = x.clone().requires_grad_()
    out = checkpoint(model[:4], leaf, use_reentrant=reentrant)
    loss = loss_of(model[4:], out)
    loss.backward()
    same([leaf.grad, *(p.grad for p in model.parameters())], expected)


def test_hooks_of_the_user_see_what_they_saw():
    keeping, model, x = pair(residual)
    seen = {}
    for name, m in (("keeping", keeping), ("recomputing", model)):
        shapes = seen.setdefault(name, [])

        def pack(t, shapes=shapes):
            shapes.append(t.shape)
            return t.detach().clone()

        with saved_tensors_hooks(pack, lambda t: t):
            found = gradients(m, x)
        same(found, gradients(m, x))
    assert seen["keeping"] == seen["recomputing"]


def test_hooks_of_the_user_around_a_part():
    _, model, x = pair(plain)
    inputs = [*model[:2].parameters(), *model[3:5].parameters()]

    def run(hooks):
        y = model[1](model[0](x))
        with hooks:
            y = model[3](y)
        return torch.autograd.grad(model[4](y).square().sum(), inputs)

    same(run(saved_tensors_hooks(lambda t: t, lambda t: t)), run(contextlib.nullcontext()))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_changed_before_the_backward_pass_is_an_error(name):
    _, model, x = pair(plain)
    loss = loss_of(model, x)
    with torch.no_grad():
        getattr(model[1], name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, model[3].weight)


def test_an_optimizer_step_before_the_backward_pass_is_an_error():
    _, model, x = pair(residual)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss_of(model, x).backward()
    loss = loss_of(model, x)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Changing(nn.Module):
    """Changes its batch norm's output in place, before or after the convolution has read it."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 3, 1)
        self.before = before

    def forward(self, x):
        y = self.bn1(x)
        if self.before:
            with torch.no_grad():
                y.mul_(2)
        z = self.conv(y)
        if not self.before:
            with torch.no_grad():
                y.mul_(2)
        return self.bn2(z)


def test_an_output_changed_in_place_before_it_is_read_is_kept():
    keeping, model, x = pair(lambda: Changing(True))
    same(gradients(model, x), gradients(keeping, x))


def test_an_output_changed_in_place_after_it_was_read_is_an_error():
    _, model, x = pair(lambda: Changing(False))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(model, x)


def test_an_output_somebody_holds_is_what_it_was():
    _, model, x = pair(plain)
    held = []
    model[1].register_forward_hook(lambda layer, inputs, out: held.append(out))
    before = gradients(model, x)
    first = held[0].detach().clone()
    gradients(model, x)
    assert torch.equal(held[0], first)
    assert torch.equal(before[0], gradients(model, x)[0])


def test_threads():
    keeping, model, x = pair(residual)
    expected = {k: gradients(keeping, x * k) for k in (1, 2, 3)}
    found = {}

    def work(k):
        for _ in range(5):
            found[k] = gradients(model, x * k)

    threads = [threading.Thread(target=work, args=(k,)) for k in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, grads in expected.items():
        same(found[k], grads)


def test_autocast():
    keeping, model, x = pair(residual)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = gradients(model, x), gradients(keeping, x)
    same(found, expected)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_recompute_too(copier):
    keeping, model, x = pair(plain)
    twin = copier(model)
    made = watch(twin)
    out = twin(x)
    assert kept(made).count(False) == 3
    del out
    same(gradients(twin, x), gradients(keeping, x))


def test_back_to_torch_and_on_again():
    _, model, x = pair(plain)
    back = gb.convert(model, "torch")
    assert not any("recompute" in vars(m) for m in back.modules())
    again = gb.convert(gb.convert(model, "ghost"), "fused")
    assert not any(getattr(m, "recompute", False) for m in again.modules())
    assert gradients(back, x)[0].shape == x.shape


def test_other_kinds_refuse():
    with pytest.raises(gb.errors.UsageError, match="recompute"):
        gb.convert(plain(), "sync", recompute=True)


def test_the_layer_says_so():
    assert "recompute=True" in repr(gb.nn.BatchNorm2d(3, recompute=True))
    assert gb.nn.LazyBatchNorm2d(recompute=True).recompute
    assert "recompute" not in repr(gb.nn.BatchNorm2d(3))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_happens(mode):
    keeping, model, x = pair(residual)
    with mode():
        assert torch.equal(model(x), keeping(x))


@pytest.mark.slow
def test_compiled_it_is_what_it_would_be_without():
    keeping, model, x = pair(plain)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    other = torch.compile(keeping, fullgraph=True, backend="aot_eager")
    same(gradients(compiled, x), gradients(other, x))


def test_export():
    _, model, x = pair(plain)
    program = torch.export.export(model.eval(), (x,), strict=False)
    assert not any("gammabeta" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), model(x))
