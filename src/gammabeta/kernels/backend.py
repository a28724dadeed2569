"""What a backend is: the protocol of its functions, the objects they take, and the registry.

``x`` is ``(N, C, *spatial)``, contiguous or channels_last; everything per channel is ``(C,)``, contiguous,
float32 (float64 where ``x`` is); ``var`` is biased; ``invstd = 1 / sqrt(var + eps)``;
``z = weight * (x - mean) * invstd + bias + residual``; ``out = pool(activation(z))``;
``xhat = (x - mean) * invstd``; ``dz`` is the loss's gradient at ``z``.

To add a backend, write a module with these functions and ``register`` it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..epilogue import Epilogue, MaxPool, Pool, pooled_shape

# --- the objects ------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """One call of batch normalization, from the public function to the kernel."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Any  # a tensor of the shape of x; before the path is chosen, what the user added
    epilogue: Epilogue
    eps: float


class Normalized(NamedTuple):
    """A call with its statistics: what a forward pass needs and a backward pass keeps."""

    call: Call
    mean: Tensor
    invstd: Tensor
    codes: Tensor | None = None  # max pooling: for each output, which element of its window it is


class Running(NamedTuple):
    """The running statistics, and how a batch enters them: ``factor`` is the weight of the new value."""

    mean: Tensor | None
    var: Tensor | None  # unbiased
    factor: float | Tensor = 0.0
    skip_nonfinite: bool = False


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # x, weight, bias, residual


class Backend(Protocol):
    """The functions of a backend. A module that has them is one."""

    def unsupported(self, x: Tensor, residual: Tensor | None, epilogue: Epilogue) -> str | None:
        """Why this backend cannot run a call that is not ``unfit``, None if it can."""

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(mean, var)`` of each channel."""

    def codes_of(self, x: Tensor, pool: Pool) -> Tensor | None:
        """Memory for the codes of max pooling, which a forward pass fills; None for any other pool."""

    def forward_train(self, call: Call, codes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normalise with the batch's statistics: ``(out, mean, var, invstd)``."""

    def forward(self, normalized: Normalized) -> Tensor:
        """Normalise with the statistics given: ``out``."""

    def backward_reduce(self, grad: Tensor, normalized: Normalized) -> tuple[Tensor, Tensor]:
        """``(sum_dz, sum_dz_xhat)``: the gradients of bias and weight."""

    def backward_apply(
        self, grad: Tensor, normalized: Normalized, means: tuple[Tensor, Tensor], need_residual: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``(dx, dresidual)`` from the means of dz and of dz * xhat; both zero in evaluation."""

    def backward(self, grad: Tensor, normalized: Normalized, need_residual: bool) -> Gradients:
        """``(dx, dweight, dbias, dresidual)``, the batch's statistics differentiated."""

    def update_running(self, running: Running, mean: Tensor, var: Tensor, count: int) -> bool | Tensor:
        """Enter a batch of ``count`` values a channel, in place; False, or a boolean tensor, if refused."""


# --- what no kernel takes ---------------------------------------------------------------------------------

LARGEST_WINDOW = 256  # elements: one byte says which of them was the greatest
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def unfit(x: Tensor, residual: Any, pool: Pool) -> str | None:
    """Why no backend's kernels can take these tensors; None if there is no such reason."""
    if x.dtype not in _FLOATS:
        return f"{x.dtype} has no kernel; kernels compute in float32"
    if x.layout is not torch.strided:
        return f"layout {x.layout} has no kernel"
    if residual is not None:
        if not isinstance(residual, Tensor):
            return "the residual is a number, not a tensor"
        if residual.shape != x.shape or residual.dtype is not x.dtype or residual.device != x.device:
            return "the residual's shape, dtype or device is not the input's, so torch broadcasts or promotes"
    if pool == 2 and x.dim() == 4 and min(x.shape[2:]) < 2:
        return "the input is smaller than the 2x2 pool"
    return None


def lacking(x: Tensor, epilogue: Epilogue, dtypes: tuple[torch.dtype, ...], max_pool: bool) -> str | None:
    """Why a backend that stores ``dtypes``, and has max pooling or not, cannot take tensors that are fit."""
    if x.dtype not in dtypes:
        stored = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"the kernels store {stored}, not {str(x.dtype).removeprefix('torch.')}"
    if x.dim() < 2:
        return "the tensor has no channels"
    if x.numel() == 0:
        return "the tensor is empty"
    pool = epilogue.pool
    if pool is None:
        return None
    if x.dim() != 4:
        return "pooling is over the last two of four dimensions"
    if isinstance(pool, MaxPool):
        if not max_pool:
            return "these kernels have no max pooling"
        if pool.kernel**2 > LARGEST_WINDOW:
            return f"a window has more than {LARGEST_WINDOW} elements"
    elif pool != 2:
        return "pooling is the mean over 2x2 windows, or a MaxPool"
    return None if min(pooled_shape(x.shape, pool)[2:]) > 0 else "the input is smaller than the pool's window"


# --- the registry -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Registered:
    """Where a backend is found, and for which devices it is chosen."""

    name: str  # what ``backend=`` takes
    label: str  # what the user is told, as in "the fused Numba kernels"
    devices: frozenset[str]  # types of device it is chosen for
    load: Callable[[], Any]  # imports and returns it; an ImportError says why it cannot


_REGISTRY: dict[str, Registered] = {}
_LOADED: dict[str, Any] = {}
_CHOSEN: dict[str, str] = {}  # by type of device


def register(name: str, label: str, devices: set[str], load: Callable[[], Any]) -> None:
    """Add a backend. Of several for one type of device, the first registered is chosen."""
    _REGISTRY[name] = Registered(name, label, frozenset(devices), load)
    _refresh(name)


def unregister(name: str) -> None:
    """Take a backend out again."""
    _REGISTRY.pop(name, None)
    _refresh(name)


def _refresh(name: str) -> None:
    _LOADED.pop(name, None)
    _CHOSEN.clear()
    for one in reversed(_REGISTRY.values()):
        _CHOSEN.update(dict.fromkeys(one.devices, one.name))


def names() -> tuple[str, ...]:
    """The names of all backends, in the order of their registration."""
    return tuple(_REGISTRY)


def label_of(name: str) -> str:
    """What a user is told of a backend."""
    return _REGISTRY[name].label


def for_device(device: str) -> str | None:
    """The name of the backend chosen for a type of device, or None if there is none."""
    return _CHOSEN.get(device)


def load(name: str) -> Any:
    """The backend (a ``Backend``), loaded at its first use; or a ``str``: why it cannot be loaded."""
    found = _LOADED.get(name)
    if found is None:
        try:
            found = _REGISTRY[name].load()
        except ImportError as error:
            found = str(error)
        _LOADED[name] = found
    return found


def _import(folder: str, package: str, label: str) -> Any:
    if find_spec(package) is None:
        raise ImportError(f"{label} is not installed (pip install {package})")
    try:
        return import_module(f"gammabeta.kernels.{folder}.host")
    except ImportError as error:
        raise ImportError(f"{label} cannot be loaded: {error}") from error


register("cpu", "the fused Numba kernels", {"cpu"}, partial(_import, "cpu", "numba", "Numba"))
register("gpu", "the fused Triton kernels", {"cuda"}, partial(_import, "gpu", "triton", "Triton"))

# The backend whose operators ``torch.compile`` puts into its graphs, by type of device.
GRAPHS = {"cpu": "cpu"} | ({"cuda": "gpu"} if find_spec("triton") is not None else {})
