"""On a machine with a GPU these tests run on it; elsewhere in Triton's interpreter, on small shapes."""

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

INTERPRETED = not torch.cuda.is_available()  # tests/conftest.py turned the interpreter on
ACTIVATIONS = {
    None: lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
}


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def gpu() -> Iterator[ModuleType]:
    """The kernels, with every fresh tensor filled with NaN, so that what is not written shows."""
    module = pytest.importorskip("gammabeta.kernels.gpu")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield module
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Cut the work for a chip of so many multiprocessors; by channels that stay whole, or by none that do."""
    from gammabeta.kernels.gpu import host, plan

    owned = plan.owned

    def pretend(multiprocessors: int, whole: bool) -> None:
        monkeypatch.setattr(host, "_chip", lambda device: plan.Chip(multiprocessors, 1 << 40))
        here = plan.Chip(
            1, 1 << 40
        )  # on which every channel fits the cache and any number of them fills the chip
        monkeypatch.setattr(plan, "owned", lambda view, n, _: owned(view, n, here) if whole else None)

    return pretend


@pytest.fixture
def torch_step() -> Callable[..., tuple[torch.Tensor, ...]]:
    """``(out, dx, dweight, dbias[, dresidual])`` by torch, in float64 or in the arguments' dtype."""

    def step(x, weight, bias, residual, grad, activation, pool, eps=1e-5, double=True):
        def leaf(t):
            return t.double().requires_grad_() if double else t.detach().clone().requires_grad_()

        leaves = [leaf(t) for t in (x, weight, bias, residual) if t is not None]
        out = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], True, 0.0, eps)
        if residual is not None:
            out = out + leaves[3]
        out = ACTIVATIONS[activation](out)
        if pool is not None:
            out = F.avg_pool2d(out, pool)
        return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))

    return step


@pytest.fixture
def within_budget() -> Callable[..., None]:
    """Every element of ours within twice torch's own worst error against float64, or a floor.

    The floor, relative to the largest true value: one unit in the last place of what is stored, and for
    float32 the rounding of a sum of a few thousand terms. Unlike an error norm, a maximum hides no single bad
    element.
    """
    floors = {torch.float32: 4e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

    def check(ours, torchs, truth, dtype, what=""):
        scale = truth.abs().max().item() + 1e-30
        assert ours.shape == truth.shape, what
        error = (ours.double() - truth).abs().max().item()
        budget = 2 * (torchs.double() - truth).abs().max().item() + floors[dtype] * scale
        assert error <= budget, f"{what}: error {error:.3g}, budget {budget:.3g}"  # NaN fails too

    return check
