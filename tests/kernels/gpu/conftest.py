"""On a machine with a GPU these tests run on it; elsewhere in Triton's interpreter, on small shapes."""

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch

INTERPRETED = not torch.cuda.is_available()  # tests/conftest.py turned the interpreter on


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def gpu() -> Iterator[ModuleType]:
    """The kernels, with every fresh tensor filled with NaN, so that what is not written shows."""
    module = pytest.importorskip("gammabeta.kernels.gpu.host")
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
