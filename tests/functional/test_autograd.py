"""Derivatives of every order and kind."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import gammabeta as gb
from gammabeta.epilogue import ACTIVATIONS, Epilogue
from gammabeta.kernels.backend import Call
from tests import oracle

batch_norm = gb.functional.batch_norm
# torch scripts some of its forward-mode rules, and warns about that.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")


def doubles(*shapes):
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(
    ("activation", "training"),
    [(activation, True) for activation in (None, *ACTIVATIONS, "elu(0.5)")]
    + [
        pytest.param(activation, False, marks=[pytest.mark.slow] * (activation not in (None, "silu")))
        for activation in (None, *ACTIVATIONS, "elu(0.5)")
    ],
)
def test_gradcheck(activation, training):
    x, weight, bias, residual = doubles((3, 2, 4, 2), (2,), (2,), (3, 2, 4, 2))
    mean, var = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)

    def f(x, weight, bias, residual):
        return batch_norm(
            x,
            mean.clone(),
            var.clone(),
            weight,
            bias,
            training,
            activation=activation,
            residual=residual,
            pool=2,
        )

    assert gradcheck(f, (x, weight, bias, residual))
    assert gradcheck(f, (x, weight, bias, residual), check_forward_ad=True, check_backward_ad=False)
    if activation not in (
        "relu",
        "relu6",
        "leaky_relu",
        "hardswish",
        "hardsigmoid",
        "hardtanh",
    ):  # those have corners
        assert gradgradcheck(f, (x, weight, bias, residual))


@pytest.mark.parametrize("training", [True, False])
def test_max_pool_second_order(training, monkeypatch):
    """By the kernels, and with a graph behind the gradients."""
    monkeypatch.setattr("gammabeta.functional.step.SMALL_TRAIN", [0, 0, 0])
    monkeypatch.setattr("gammabeta.functional.step.SMALL_EVAL", [0, 0, 0])
    window = gb.functional.MaxPool(3, 2, 1)
    x, weight, bias = torch.randn(4, 3, 9, 9), torch.rand(3) + 0.5, torch.randn(3)
    upstream, direction = torch.randn(4, 3, 5, 5), torch.randn(x.shape)

    def orders(kind, function):
        leaves = [t.to(kind, copy=True).requires_grad_() for t in (x, weight, bias)]
        out = function(*leaves, torch.zeros(3, dtype=kind), torch.ones(3, dtype=kind))
        first = torch.autograd.grad(out, leaves, upstream.to(kind), retain_graph=True)
        (again,) = torch.autograd.grad(out, leaves[0], upstream.to(kind), create_graph=True)
        return [*first, *torch.autograd.grad((again * direction.to(kind)).sum(), leaves[:2])]

    def ours(x, weight, bias, mean, var):
        return batch_norm(x, mean, var, weight, bias, training, activation="relu", pool=window)

    def exact(x, weight, bias, mean, var):
        call = Call(x, weight, bias, None, Epilogue("relu", window), 1e-5)
        return oracle.batch_norm(call, None if training else (mean, var))

    for found, expected in zip(orders(torch.float32, ours), orders(torch.float64, exact), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 6, 6), (4, 3, 40, 40)])
def test_max_pool_under_functorch(shape):
    window = gb.functional.MaxPool(2, 2)
    x, tangent = torch.randn(shape), torch.randn(shape)

    def ours(x):
        return batch_norm(x, None, None, training=True, activation="relu", pool=window).square().sum()

    def theirs(x):
        return F.max_pool2d(F.relu(F.batch_norm(x, None, None, training=True)), 2).square().sum()

    torch.testing.assert_close(
        torch.func.jvp(ours, (x,), (tangent,)), torch.func.jvp(theirs, (x,), (tangent,))
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_kernels_against_float64_first_and_second(activation, residual, training):
    """The kernels have no float64: their float32 gradients are compared with the reference's in float64."""
    shapes = [(8, 3, 6, 6), (3,), (3,)] + [(8, 3, 6, 6)] * residual
    exact = doubles(*shapes)
    single = [t.detach().float().requires_grad_() for t in exact]
    upstream = torch.randn(8, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    direction = [torch.randn(shape, dtype=torch.float64) for shape in shapes]

    def ours(x, weight, bias, residual=None):
        running = torch.zeros(3), torch.ones(3)
        return batch_norm(
            x, *running, weight, bias, training, activation=activation, residual=residual, backend="cpu"
        )

    def exactly(x, weight, bias, residual=None):
        kind = x.dtype
        given = None if training else (torch.zeros(3, dtype=kind), torch.ones(3, dtype=kind))
        return oracle.batch_norm(Call(x, weight, bias, residual, Epilogue(activation), 1e-5), given)

    def orders(function, inputs):
        kind = inputs[0].dtype
        up = upstream.to(kind)
        first = torch.autograd.grad(function(*inputs), inputs, up, create_graph=True)
        scalar = sum((g * d.to(kind)).sum() for g, d in zip(first, direction, strict=True))
        second = torch.autograd.grad(scalar, [*inputs[:2], upstream], allow_unused=True)
        plain = torch.autograd.grad(function(*inputs), inputs, up.detach())
        return [g.double() for g in (*first, *plain, *second) if g is not None]

    torch.testing.assert_close(orders(ours, single), orders(exactly, exact), rtol=2e-3, atol=2e-4)


def loss(x, weight, bias, training=True):
    out = batch_norm(x, torch.zeros(3), torch.ones(3), weight, bias, training, activation="silu")
    return (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()


def reference_loss(x, weight, bias, training=True):
    out = F.silu(F.batch_norm(x, torch.zeros(3), torch.ones(3), weight, bias, training))
    return (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (64, 3, 40, 40)])
def test_functorch(shape):
    x, weight, bias = torch.randn(shape), torch.rand(3), torch.rand(3)
    tangents = torch.randn(shape), torch.rand(3), torch.rand(3)
    for transform in (
        lambda f: torch.func.grad(f, argnums=(0, 1, 2))(x, weight, bias),
        lambda f: torch.func.jvp(f, (x, weight, bias), tangents),
        lambda f: torch.func.vmap(lambda x, w: f(x, w, bias, False), randomness="error")(
            torch.stack([x, x + 1]), torch.stack([weight, weight * 2])
        ),
        lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x, weight, bias, False)))(
            torch.stack([x, x + 1])
        ),
    ):
        torch.testing.assert_close(transform(loss), transform(reference_loss), rtol=1e-4, atol=1e-3)


def test_hessian_vector_product_and_module_under_functional_call():
    layer = gb.nn.BatchNorm2d(3, activation="silu")
    theirs = torch.nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5)

    def ours(params):
        return torch.func.functional_call(layer.eval(), params, (x,)).square().sum()

    def torchs(params):
        return F.silu(torch.func.functional_call(theirs.eval(), params, (x,))).square().sum()

    params = dict(theirs.named_parameters())
    torch.testing.assert_close(
        torch.func.hessian(ours)(params), torch.func.hessian(torchs)(params), rtol=1e-4, atol=1e-4
    )


def test_forward_mode_of_a_large_input():
    x, tangent = torch.randn(64, 3, 40, 40), torch.randn(64, 3, 40, 40)
    with forward_ad.dual_level():
        out = batch_norm(forward_ad.make_dual(x, tangent), None, None, training=True)
        expected = F.batch_norm(forward_ad.make_dual(x, tangent), None, None, training=True)
        torch.testing.assert_close(forward_ad.unpack_dual(out), forward_ad.unpack_dual(expected))


def test_no_gradient_arrives():
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    out = batch_norm(x, None, None, training=True, backend="cpu")
    (grad,) = torch.autograd.grad(x.sum() + 0 * out.detach().sum(), x)
    torch.testing.assert_close(grad, torch.ones_like(x))


def test_changed_input_is_noticed():
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    y = x * 1
    out = batch_norm(y, None, None, training=True, backend="cpu")
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_statistics_may_move_between_evaluation_and_its_backward_pass():
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    mean, var = torch.zeros(3), torch.ones(3)
    out = batch_norm(x, mean, var, backend="cpu")
    batch_norm(x, mean, var, training=True, backend="cpu")
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / (1 + 1e-5) ** 0.5))
