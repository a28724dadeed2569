"""In graphs: ``torch.library``'s own checks, ``torch.compile``, ``torch.export``."""

import copy

import pytest
import torch

import gammabeta as gb

batch_norm = gb.functional.batch_norm
# inductor imports modules of torch that use torch.jit, and torch warns about that.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")


def arguments(layout=torch.contiguous_format, residual=False, requires_grad=True):
    x = torch.randn(4, 3, 6, 6).contiguous(memory_format=layout).requires_grad_(requires_grad)
    weight, bias = (torch.rand(3, requires_grad=requires_grad) for _ in range(2))
    other = torch.randn(4, 3, 6, 6).contiguous(memory_format=layout).requires_grad_(requires_grad)
    return x, weight, bias, other if residual else None


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own, from PyTorch 2.14 on
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("residual", "activation", "pool"), [(False, None, None), (True, "relu", 2)])
def test_opcheck(layout, residual, activation, pool):
    x, weight, bias, other = arguments(layout, residual)
    ops = torch.ops.gammabeta
    torch.library.opcheck(ops.batch_norm_train, (x, weight, bias, other, 1e-5, activation, pool))
    mean, invstd = torch.randn(3), torch.rand(3) + 0.5
    torch.library.opcheck(ops.batch_norm_apply, (x, mean, invstd, weight, bias, other, activation, pool))
    detached = [t if t is None else t.detach() for t in (x, weight, bias, other)]
    grad = torch.randn(4, 3, 3, 3) if pool else torch.randn(4, 3, 6, 6)
    for training in (True, False):
        torch.library.opcheck(
            ops.batch_norm_backward,
            (grad, *detached, mean, invstd, activation, pool, training, True, True, residual),
        )


def test_operators_in_float64_and_without_parameters():
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    ops = torch.ops.gammabeta
    assert torch.autograd.gradcheck(
        lambda x: ops.batch_norm_train(x, None, None, None, 1e-5, "silu", 2)[0], (x,)
    )
    assert torch.autograd.gradgradcheck(
        lambda x: ops.batch_norm_train(x, None, None, None, 1e-5, "silu", None)[0], (x[:2, :2, :3, :1],)
    )


class Net(torch.nn.Module):
    def __init__(self, residual, pool=2):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)
        self.bn = gb.nn.BatchNorm2d(3, activation="relu", pool=pool)
        self.residual = residual

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y, x if self.residual else None)


def train_step(model, x):
    leaf = x.clone().requires_grad_()
    out = model(leaf)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(4)))
    return out.detach(), leaf.grad


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("residual", "pool"), [(False, 2), (True, 2), (False, gb.functional.MaxPool(3, 2, 1))]
)
def test_compile_fullgraph(residual, pool, backend):
    eager = Net(residual, pool)
    compiled_net = copy.deepcopy(eager)
    compiled = torch.compile(compiled_net, fullgraph=True, backend=backend)
    for training in (True, False):
        eager.train(training), compiled_net.train(training)
        for _ in range(2):
            x = torch.randn(4, 3, 8, 8)
            torch.testing.assert_close(train_step(compiled, x), train_step(eager, x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(compiled_net.state_dict(), eager.state_dict())
    grads = [[p.grad for p in net.parameters()] for net in (compiled_net, eager)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"momentum": None}, {"initialize": "first_batch"}])
def test_compiled_statistics(settings):
    eager = gb.nn.BatchNorm2d(3, **settings)
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5) * 3 + 1
        torch.testing.assert_close(compiled(x), eager(x))
        torch.testing.assert_close(layer.state_dict(), eager.state_dict())
    before = copy.deepcopy(layer.state_dict())
    compiled(torch.full((4, 3, 5, 5), float("nan")))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_compile_frozen_and_ghost():
    for layer in (gb.nn.FrozenBatchNorm2d(3), gb.nn.GhostBatchNorm2d(3, virtual_batch_size=2)):
        twin = copy.deepcopy(layer)
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
        for size in (4, 5):
            x = torch.randn(size, 3, 4, 4)
            torch.testing.assert_close(compiled(x), layer(x))
            torch.testing.assert_close(twin.state_dict(), layer.state_dict())


# PyTorch 2.6 does not tell that torch.export traces.
TELLS = hasattr(torch.compiler, "is_exporting")


@pytest.mark.parametrize("pool", [2, gb.functional.MaxPool(3, 2, 1)])
def test_compiled_graph_holds_our_operator_and_an_exported_one_does_not(pool):
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    model, x = Net(False, pool), torch.randn(4, 3, 8, 8)
    torch.compile(model, fullgraph=True, backend=backend)(x)
    assert any("batch_norm_train" in target for target in seen)
    for training in (True, False):
        model.train(training)
        program = torch.export.export(model, (x,))
        if TELLS:
            assert not any("gammabeta" in str(node.target) for node in program.graph.nodes)
        expected = copy.deepcopy(model)(x)
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-5)


def test_dynamic_shapes():
    layer = gb.nn.BatchNorm2d(3, activation="relu")
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((4, 3, 5, 6), (2, 3, 8, 8), (7, 3, 3, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)


def test_named_backend_in_a_graph():
    x, mean, var = torch.randn(4, 3, 5, 5), torch.zeros(3), torch.ones(3)
    compiled = torch.compile(
        lambda x: batch_norm(x, mean, var, activation="relu", backend="cpu"),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(compiled(x), batch_norm(x, mean, var, activation="relu", backend="torch"))
    with pytest.raises(Exception, match="float64"):
        torch.compile(
            lambda x: batch_norm(x, mean.double(), var.double(), backend="cpu"),
            fullgraph=True,
            backend="eager",
        )(x.double())


def test_torch_func_inside_a_compiled_function():
    weight, bias = torch.rand(3), torch.rand(3)

    def loss(x):
        out = batch_norm(x, None, None, weight, bias, True, activation="silu")
        return (out * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum()

    def each(x):
        return torch.func.vmap(lambda y: batch_norm(y, torch.zeros(3), torch.ones(3)))(x)

    x = torch.randn(2, 4, 3, 5, 5)
    for transform, value in ((lambda x: torch.func.grad(loss)(x), x[0]), (each, x)):
        compiled = torch.compile(transform, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(value), transform(value), rtol=1e-4, atol=1e-4)


def test_torch_function_sees_the_call():
    class Loud(torch.Tensor):
        calls = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.calls.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    x = torch.randn(4, 3, 5, 5)
    out = batch_norm(x.as_subclass(Loud), torch.zeros(3), torch.ones(3), activation="relu")
    assert batch_norm in Loud.calls
    torch.testing.assert_close(
        out.as_subclass(torch.Tensor), batch_norm(x, torch.zeros(3), torch.ones(3), activation="relu")
    )
