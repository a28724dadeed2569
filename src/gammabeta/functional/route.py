"""Which road a call takes, and why."""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from ..errors import UnavailableError
from ..kernels.layout import MaxPool, Pool, dense, like
from .checks import check_extras, irregular

_LOADED: dict[str, ModuleType | str] = {}
_NEEDS = {"cpu": ("numba", "Numba"), "gpu": ("triton", "Triton")}
_TYPES = (Tensor, Parameter)
_WIDENED = (torch.float32, torch.bfloat16, torch.float16)


def kernels(name: str) -> ModuleType | str:
    """The module of a backend's kernels, loaded at its first use, or the reason why it cannot be loaded."""
    found = _LOADED.get(name)
    if found is None:
        package, label = _NEEDS[name]
        if find_spec(package) is None:
            found = f"{label} is not installed (pip install {package})"
        else:
            try:
                found = import_module(f"gammabeta.kernels.{name}")
            except ImportError as error:
                found = f"{label} cannot be loaded: {error}"
        _LOADED[name] = found
    return found


def traced(x: Tensor) -> str | None:
    """Why this call is not plain eager execution on a plain tensor, or None if it is."""
    if type(x) not in _TYPES:
        return f"the input is a {type(x).__name__}, which only torch's operators know"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active; torch's operators can be transformed"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active; torch's operators have the rule for it"
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode is active and shall see torch's operators"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit is tracing and shall see torch's operators"
    return None


def pools_apart(x: Tensor, pool: Pool, backend: str) -> bool:
    """Whether max pooling is left to torch's operator, after what the kernels do: theirs is for eager CPU."""
    return isinstance(pool, MaxPool) and (not x.is_cpu or backend == "gpu" or torch.compiler.is_compiling())


def unfit(x: Tensor, residual: Any, pool: Pool) -> str | None:
    """Why no kernel may be asked for these tensors: what all kernels have in common."""
    if x.dtype not in _WIDENED:
        return f"{x.dtype} has no kernel; kernels compute in float32"
    if x.layout is not torch.strided:
        return f"layout {x.layout} has no kernel"
    if residual is not None:
        if not isinstance(residual, Tensor):
            return "the residual is a number, not a tensor"
        if residual.shape != x.shape or residual.dtype is not x.dtype or residual.device != x.device:
            return "the residual's shape, dtype or device is not the input's, so torch broadcasts or promotes"
    if pool == 2 and min(x.shape[2:]) < 2:
        return "the input is smaller than the 2x2 pool"
    return None


# Elements up to which torch's operators are quicker than a kernel and the Python around it: with nothing to
# fold, with one thing, with more. Measured; see docs/design/modules.md.
SMALL_TRAIN = [98304, 98304, 65536]
SMALL_EVAL = [1 << 20, 1 << 18, 1 << 16]


def is_small(x: Tensor, training: bool, activation: str | None, residual: Any, pool: Pool) -> bool:
    """Whether a regular eager call on the CPU is too small for a kernel to pay."""
    size = x.numel()
    extras = (activation is not None) + (residual is not None) + (pool is not None)
    if size > (SMALL_TRAIN if training else SMALL_EVAL)[extras if extras < 2 else 2] or size == 0:
        return False
    return not torch.compiler.is_compiling() and x.is_cpu and traced(x) is None


def select(
    x: Tensor, residual: Any, activation: str | None, pool: Pool, backend: str
) -> tuple[ModuleType | str, Tensor, Any]:
    """The kernels for a regular call, or the reason for torch's road; the tensors in a layout it can read.

    Raises:
        UnavailableError: a backend was named and cannot serve the call.
    """
    if backend == "torch":
        return "backend='torch' was asked for", x, residual
    why = traced(x) or unfit(x, residual, pool)
    if why is None:
        name = backend
        if name == "auto":
            if not x.is_cpu and not x.is_cuda:
                return f"there is no kernel for device {x.device.type!r}", x, residual
            name = "cpu" if x.is_cpu else "gpu"
        module = kernels(name)
        if isinstance(module, str):
            why = module
        else:
            x = dense(x)
            residual = None if residual is None else like(residual, x)
            why = module.unsupported(x, residual, activation, pool)
            if why is None:
                return module, x, residual
    if backend != "auto":
        raise UnavailableError(f"backend={backend!r} cannot run this call: {why}; use backend='auto'")
    return why, x, residual


_TRITON = find_spec("triton") is not None


def select_compiled(x: Tensor, residual: Any, pool: Pool, backend: str) -> str | None:
    """While ``torch.compile`` traces: why torch's road is taken, or None for the operator of ``_ops``.

    Reads nothing but metadata and loads nothing, so that it can be traced; the operator finds its kernels
    when it runs. An exported program holds torch's operators only: it must run where this package is not.

    Raises:
        UnavailableError: a backend was named and cannot serve the call.
    """
    if backend == "torch":
        return "backend='torch' was asked for"
    if torch.compiler.is_exporting():
        return "torch.export is tracing; the program shall run without this package"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active; torch's operators can be transformed"
    why = unfit(x, residual, pool)
    device = x.device.type
    if why is None and not (
        (device == "cpu" and backend != "gpu" and x.dtype is not torch.float16)
        or (device == "cuda" and backend != "cpu" and _TRITON)
    ):
        why = f"there is no kernel for {x.dtype} on {device!r} here"
    if why is not None and backend != "auto":
        raise UnavailableError(f"backend={backend!r} cannot run this call: {why}; use backend='auto'")
    return why


@dataclass(frozen=True)
class Explanation:
    """Which road a call takes: ``path`` is ``"cpu"``, ``"gpu"`` or ``"torch"``, ``reason`` a sentence."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def explain(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    pool: Pool = None,
    backend: str = "auto",
) -> Explanation:
    """Say which road ``batch_norm`` takes for the same arguments, and why; nothing is computed.

    Args:
        x: and all others: as for ``batch_norm``.
        running_mean: see ``batch_norm``.
        running_var: see ``batch_norm``.
        weight: see ``batch_norm``.
        bias: see ``batch_norm``.
        training: see ``batch_norm``.
        momentum: see ``batch_norm``.
        eps: see ``batch_norm``.
        activation: see ``batch_norm``.
        residual: see ``batch_norm``.
        pool: see ``batch_norm``.
        backend: see ``batch_norm``.

    Returns:
        An ``Explanation``; ``str()`` of it is one line.

    Raises:
        UnavailableError: a backend was named and cannot serve the call.
    """
    check_extras(x, activation, pool, backend)
    apart = pools_apart(x, pool, backend)
    pool = None if apart else pool
    if backend == "auto" and is_small(x, training, activation, residual, pool):
        return Explanation("torch", "a small input: torch's operators are quicker than a kernel's call")
    if irregular(x, running_mean, running_var, weight, bias, training, momentum, eps):
        return Explanation(
            "torch", "torch refuses these arguments, or treats them as a special case (an empty input)"
        )
    chosen = select(x, residual, activation, pool, backend)[0]
    if isinstance(chosen, str):
        return Explanation("torch", chosen)
    name = chosen.__name__.rpartition(".")[2]
    asked = "chosen for this device and dtype" if backend == "auto" else f"backend={backend!r} was asked for"
    made = {"cpu": "the fused Numba kernels", "gpu": "the fused Triton kernels"}[name]
    return Explanation(name, f"{made}; {asked}" + "; max pooling by torch's operator" * apart)
