"""What follows the normalisation in the same pass: ``pool(activation(bn(x) + residual))``.

``ACTIVATIONS`` has a row for each activation, with all that the package knows of it but its arithmetic, which
each backend of ``gammabeta.kernels`` has in its own language. The checks, torch's path, what ``convert`` and
``fold`` look for and the list in the documentation are read off this table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UsageError

# --- pooling ----------------------------------------------------------------------------------------------


class MaxPool(NamedTuple):
    """Max pooling over square windows, as ``torch.nn.MaxPool2d(kernel, stride, padding)``.

    A last window that would reach beyond the padding is left out (``ceil_mode=False``).
    """

    kernel: int
    stride: int
    padding: int = 0


Pool = int | MaxPool | None  # 2: the mean over 2x2 windows


def pooled_shape(shape: tuple[int, ...], pool: Pool) -> tuple[int, ...]:
    """The shape of the output; rows and columns that fill no window are dropped."""
    if pool is None:
        return shape
    kernel, stride, padding = pool if isinstance(pool, MaxPool) else (pool, pool, 0)
    return (*shape[:2], *((side + 2 * padding - kernel) // stride + 1 for side in shape[2:]))


def pool_by_torch(out: Tensor, pool: Pool) -> Tensor:
    """The mean over squares, or the greatest of windows, by torch's operators."""
    if isinstance(pool, MaxPool):
        found: Tensor = F.max_pool2d(out, pool.kernel, pool.stride, pool.padding)
        return found
    return out if pool is None else F.avg_pool2d(out, pool)


# --- activations ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Activation:
    """One activation, as PyTorch and oneDNN know it."""

    name: str
    formula: str
    derivative: str
    function: Callable[[Tensor], Tensor]
    module: type[nn.Module]
    calls: tuple[Any, ...] = ()  # other functions, and names of methods, that compute it too
    settings: Mapping[str, object] = field(default_factory=dict)  # the only values it may be given
    onednn: tuple[str, tuple[float, ...], str] | None = None  # name, numbers and algorithm there

    def is_module(self, module: nn.Module) -> bool:
        """Whether ``module`` computes this activation, with settings that we have."""
        return type(module) is self.module and all(
            getattr(module, name, value) == value for name, value in self.settings.items()
        )

    def is_call(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether ``function(value, *args, **kwargs)`` computes it, in place or not; a string is a method."""
        if function not in (self.function, *self.calls):
            return False
        names = (*self.settings, "inplace")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        given.pop("inplace", None)
        known = len(args) <= len(names) and given.keys() <= self.settings.keys()
        return known and all(self.settings[name] == value for name, value in given.items())


_ROWS = (
    Activation(
        name="relu",
        formula="max(z, 0)",
        derivative="1 for z > 0, else 0",
        function=F.relu,
        module=nn.ReLU,
        calls=(F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, "relu", "relu_"),
        onednn=("relu", (), ""),
    ),
    Activation(
        name="relu6",
        formula="min(max(z, 0), 6)",
        derivative="1 for 0 < z < 6, else 0",
        function=F.relu6,
        module=nn.ReLU6,
        onednn=("hardtanh", (0.0, 6.0), ""),
    ),
    Activation(
        name="leaky_relu",
        formula="z for z > 0, else 0.01 z",
        derivative="1 for z > 0, else 0.01",
        function=F.leaky_relu,
        module=nn.LeakyReLU,
        calls=(F.leaky_relu_,),
        settings={"negative_slope": 0.01},
        onednn=("leaky_relu", (0.01,), ""),
    ),
    Activation(
        name="silu",
        formula="z σ(z)",
        derivative="σ(z) (1 + z (1 − σ(z)))",
        function=F.silu,
        module=nn.SiLU,
        onednn=("swish", (), ""),
    ),
    Activation(
        name="hardswish",
        formula="z min(max(z + 3, 0), 6) / 6",
        derivative="0 for z ≤ −3, 1 for z ≥ 3, else z/3 + 1/2",
        function=F.hardswish,
        module=nn.Hardswish,
        onednn=("hardswish", (), ""),
    ),
    Activation(
        name="gelu",
        formula="z Φ(z), the exact form",
        derivative="Φ(z) + z φ(z)",
        function=F.gelu,
        module=nn.GELU,
        settings={"approximate": "none"},
        onednn=("gelu", (), "none"),
    ),
)

#: Every activation there is, by the name that ``activation=`` takes.
ACTIVATIONS: dict[str, Activation] = {row.name: row for row in _ROWS}


def activation_of_module(module: nn.Module) -> str | None:
    """The name of the activation that a module computes, or None."""
    return next((row.name for row in _ROWS if row.is_module(module)), None)


def activation_of_call(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """The name of the activation that ``function(value, *args, **kwargs)`` computes, or None."""
    return next((row.name for row in _ROWS if row.is_call(function, args, kwargs)), None)


def require_arithmetic(backend: str, names: set[str]) -> None:
    """Refuse a backend whose arithmetic lacks an activation of the table, or has one that is not in it.

    Raises:
        NotImplementedError: naming them. It is raised where the backend is imported.
    """
    if names != ACTIVATIONS.keys():
        differ = ", ".join(sorted(names ^ ACTIVATIONS.keys()))
        raise NotImplementedError(
            f"the arithmetic of backend {backend!r} and epilogue.ACTIVATIONS differ: {differ}"
        )


# --- both together ----------------------------------------------------------------------------------------


class Epilogue(NamedTuple):
    """What a batch norm computes after the normalisation and the residual; ``epilogue_of`` checks one."""

    activation: str | None = None
    pool: Pool = None

    def __str__(self) -> str:
        parts = [self.activation] if self.activation else []
        if isinstance(self.pool, MaxPool):
            parts.append(f"{self.pool.kernel}x{self.pool.kernel} max pool")
        elif self.pool:
            parts.append("2x2 mean pool")
        return " + ".join(parts)

    def apply(self, out: Tensor, residual: Any = None) -> Tensor:
        """``pool(activation(out + residual))`` by torch's operators, broadcasting and promotion included."""
        if residual is not None:
            out = out + residual
        if self.activation is not None:
            out = ACTIVATIONS[self.activation].function(out)
        return pool_by_torch(out, self.pool)


NOTHING = Epilogue()
_UNPOOLED = {None: NOTHING} | {name: Epilogue(name) for name in ACTIVATIONS}


def epilogue_of(activation: str | None, pool: Pool) -> Epilogue:
    """The epilogue of these settings.

    Raises:
        UsageError: an activation or a pool that does not exist; it says what there is.
    """
    unpooled = _UNPOOLED.get(activation)
    if unpooled is None:
        raise UsageError(f"activation must be None or one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if pool is None:
        return unpooled
    if isinstance(pool, MaxPool):
        _check_windows(pool)
    elif pool != 2:
        raise UsageError(f"pool must be None, 2 (the 2x2 mean) or a MaxPool, got {pool!r}")
    return Epilogue(activation, pool)


def _check_windows(pool: MaxPool) -> None:
    kernel, stride, padding = pool
    if any(type(n) is not int for n in pool) or kernel < 1 or stride < 1 or not 0 <= padding <= kernel // 2:
        raise UsageError(
            "MaxPool needs kernel and stride of at least 1 and padding of at most half the kernel, "
            f"got kernel={kernel!r}, stride={stride!r}, padding={padding!r}"
        )
