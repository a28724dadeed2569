"""A backend of one's own: registered, chosen, explained, trained through, refused, taken out again."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gammabeta.epilogue import Epilogue, MaxPool, pooled_shape
from gammabeta.errors import UnavailableError, UsageError
from gammabeta.functional import batch_norm, explain
from gammabeta.kernels import backend as backends
from gammabeta.kernels import tensors
from gammabeta.kernels.backend import Call, Normalized
from tests import oracle


class Toy:
    """``tensors``, but for two functions that are counted, and one refusal of its own."""

    def __init__(self) -> None:
        self.forwards = self.backwards = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(tensors, name)

    def unsupported(self, x: Tensor, residual: Tensor | None, epilogue: Epilogue) -> str | None:
        return "the toy knows no GELU" if epilogue.activation == "gelu" else None

    def forward_train(self, call: Call, codes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self.forwards += 1
        mean, var = tensors.statistics(call.x)
        invstd = 1 / (var + call.eps).sqrt()
        return tensors.forward(Normalized(call, mean, invstd)), mean, var, invstd

    def backward(self, grad: Tensor, normalized: Normalized, need_residual: bool) -> Any:
        self.backwards += 1
        return tensors.backward(grad, normalized, need_residual)


@pytest.fixture
def toy() -> Iterator[Toy]:
    made, before = Toy(), backends.names()
    backends.register("toy", "the toy", set(), lambda: made)
    yield made
    backends.unregister("toy")
    assert backends.names() == before


class Net(nn.Module):
    """A convolution, batch norm with all that may follow it, and a linear layer."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6 * 16, 4)
        self.bn = nn.BatchNorm2d(6)  # keeps the parameters and statistics
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        y, bn = self.conv(x), self.bn
        z = batch_norm(
            y, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training,
            activation="silu", residual=y, pool=2, backend=self.backend,
        )  # fmt: skip
        out: Tensor = self.linear(z.flatten(1))
        return out


def test_a_network_trains_through_it(toy: Toy) -> None:
    ours, torchs = Net("toy"), Net("torch")
    torchs.load_state_dict(ours.state_dict())
    x, labels = torch.randn(12, 3, 8, 8), torch.arange(12) % 4
    losses = []
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.3) for net in (ours, torchs)]
    for _ in range(8):
        for net, optimizer in zip((ours, torchs), optimizers, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        torch.testing.assert_close(*([p.grad for p in net.parameters()] for net in (ours, torchs)))
    assert toy.forwards == toy.backwards == 8
    assert losses[-2] < losses[0] / 4
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x))


@pytest.mark.parametrize("pool", [None, 2, MaxPool(3, 2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_its_gradients_are_within_the_budget(toy: Toy, dtype: torch.dtype, pool: Any) -> None:
    x, residual = (torch.randn(4, 3, 7, 6).to(dtype) for _ in range(2))
    call = Call(x, torch.rand(3) + 0.5, torch.randn(3), residual, Epilogue("silu", pool), 1e-5)
    grad = torch.randn(pooled_shape(x.shape, pool)).to(dtype)
    leaves = [t.detach().requires_grad_() for t in call[:4]]
    out = batch_norm(
        leaves[0], None, None, *leaves[1:3], True,
        activation="silu", residual=leaves[3], pool=pool, backend="toy",
    )  # fmt: skip
    found = oracle.Outcome(out.detach(), *torch.autograd.grad(out, leaves, grad))
    oracle.assert_outcome(found, call, grad)
    assert toy.forwards == toy.backwards == 1


def test_it_is_explained_and_its_refusal_is_repeated(toy: Toy) -> None:
    x, mean, var = torch.randn(4, 3, 5, 5), torch.zeros(3), torch.ones(3)
    found = explain(x, mean, var, backend="toy")
    assert found.path == "toy"
    assert found.reason.startswith("the toy; ")
    assert "asked for" in found.reason
    for function in (batch_norm, explain):
        with pytest.raises(
            UnavailableError, match="backend='toy' cannot run this call: the toy knows no GELU"
        ):
            function(x, mean, var, training=True, activation="gelu", backend="toy")
        with pytest.raises(UnavailableError, match="float64"):  # what no backend is asked
            function(x.double(), mean.double(), var.double(), backend="toy")
    assert toy.forwards == 0


def test_a_backend_that_cannot_be_loaded_says_why() -> None:
    def load() -> Any:
        raise ImportError("the toy is in the other box")

    backends.register("lost", "the lost toy", set(), load)
    try:
        with pytest.raises(UnavailableError, match="the toy is in the other box"):
            batch_norm(torch.randn(4, 3), None, None, training=True, backend="lost")
    finally:
        backends.unregister("lost")
    with pytest.raises(UsageError, match="backend must be one of auto, cpu, gpu, torch"):
        batch_norm(torch.randn(4, 3), None, None, training=True, backend="lost")


def test_of_several_for_a_device_the_first_registered_is_chosen() -> None:
    x, parameters = torch.empty(8, 3, 5, 5, device="meta"), torch.empty(3, device="meta")
    first, second = Toy(), Toy()
    assert explain(x, parameters, parameters).path == "torch"
    try:
        backends.register("first", "the first toy", {"meta"}, lambda: first)
        backends.register("second", "the second toy", {"meta", "cpu"}, lambda: second)
        assert backends.for_device("cpu") == "cpu"
        assert (
            str(explain(x, parameters, parameters))
            == "first: the first toy; chosen for this device and dtype"
        )
        batch_norm(x, None, None, training=True)
        assert (first.forwards, second.forwards) == (1, 0)
        batch_norm(x, None, None, training=True, backend="second")
        assert (first.forwards, second.forwards) == (1, 1)
        backends.unregister("first")
        assert explain(x, parameters, parameters).path == "second"
    finally:
        backends.unregister("first")
        backends.unregister("second")


def test_every_backend_has_the_functions_of_the_protocol() -> None:
    functions = [name for name in vars(backends.Backend) if not name.startswith("_")]
    assert "forward_train" in functions
    for name in ("cpu", "gpu"):
        loaded = backends.load(name)
        if not isinstance(loaded, str):
            assert all(callable(getattr(loaded, function)) for function in functions), name
    assert all(callable(getattr(tensors, function)) for function in functions)
