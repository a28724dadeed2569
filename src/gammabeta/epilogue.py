"""What follows the normalisation in the same pass: ``pool(activation(bn(x) + residual))``.

``ACTIVATIONS`` has a row for each activation, with all that the package knows of it but its arithmetic, which
each backend of ``gammabeta.kernels`` has in its own language. The checks, torch's path, what ``convert`` and
``fold`` look for and the list in the documentation are read off this table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
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
    function: Callable[..., Tensor]  # torch's; it and the module take ``settings``
    module: type[nn.Module]
    calls: tuple[Any, ...] = ()  # other functions, and names of methods, that compute it too
    settings: Mapping[str, Any] = field(default_factory=dict)  # the values that make it this activation
    numbers: bool = False  # the settings may be any numbers, given behind the name: "leaky_relu(0.2)"
    onednn: tuple[str, tuple[float, ...], str] | None = None  # name, numbers and algorithm there

    def apply(self, z: Tensor) -> Tensor:
        """Compute it by torch's function."""
        return self.function(z, **self.settings)

    def of(self, *numbers: float) -> "Activation":
        """The same activation with other numbers; its name is the one spelling for them.

        Raises:
            ValueError: numbers that it cannot have.
        """
        values = tuple(float(number) + 0.0 for number in numbers)  # -0.0 is 0.0
        if not self.numbers or len(values) != len(self.settings) or not all(map(isfinite, values)):
            raise ValueError(f"{self.name} does not take these numbers")
        if self.name == "hardtanh" and values[0] >= values[1]:
            raise ValueError("the bounds of hardtanh must be in order")
        if values == tuple(self.settings.values()):
            return self
        name = f"{self.name}({', '.join(map(repr, values))})"
        return replace(
            self,
            name=_OTHER_NAMES.get(name, name),
            settings=dict(zip(self.settings, values, strict=True)),
            onednn=None if self.onednn is None else (self.onednn[0], values, self.onednn[2]),
        )


_OTHER_NAMES = {"hardtanh(0.0, 6.0)": "relu6"}
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
        numbers=True,
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
    Activation(
        name="mish",
        formula="z tanh(log(1 + exp(z)))",
        derivative="t + z σ(z) (1 − t²), where t = tanh(log(1 + exp(z)))",
        function=F.mish,
        module=nn.Mish,
    ),
    Activation(
        name="tanh",
        formula="tanh(z)",
        derivative="1 − tanh(z)²",
        function=torch.tanh,
        module=nn.Tanh,
        calls=(F.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_, "tanh", "tanh_"),
        onednn=("tanh", (), ""),
    ),
    Activation(
        name="sigmoid",
        formula="σ(z)",
        derivative="σ(z) (1 − σ(z))",
        function=torch.sigmoid,
        module=nn.Sigmoid,
        calls=(F.sigmoid, torch.sigmoid_, torch.special.expit, Tensor.sigmoid, Tensor.sigmoid_,
               "sigmoid", "sigmoid_"),
        onednn=("sigmoid", (), ""),
    ),
    Activation(
        name="hardsigmoid",
        formula="min(max(z + 3, 0), 6) / 6",
        derivative="1/6 for −3 < z < 3, else 0",
        function=F.hardsigmoid,
        module=nn.Hardsigmoid,
        onednn=("hardsigmoid", (), ""),
    ),
    Activation(
        name="gelu_tanh",
        formula="z σ(2u), where u = √(2/π) (z + 0.044715 z³)",
        derivative="σ(2u) + 2 z u' σ(2u) (1 − σ(2u))",
        function=F.gelu,
        module=nn.GELU,
        settings={"approximate": "tanh"},
        onednn=("gelu", (), "tanh"),
    ),
    Activation(
        name="elu",
        formula="z for z > 0, else exp(z) − 1",
        derivative="1 for z > 0, else exp(z)",
        function=F.elu,
        module=nn.ELU,
        calls=(F.elu_,),
        settings={"alpha": 1.0},
        numbers=True,
    ),
    Activation(
        name="hardtanh",
        formula="min(max(z, −1), 1)",
        derivative="1 for −1 < z < 1, else 0",
        function=F.hardtanh,
        module=nn.Hardtanh,
        calls=(F.hardtanh_,),
        settings={"min_val": -1.0, "max_val": 1.0},
        numbers=True,
        onednn=("hardtanh", (-1.0, 1.0), ""),
    ),
)  # fmt: skip

#: Every activation there is, by the name that ``activation=`` takes; some also take numbers, see ``named``.
ACTIVATIONS: dict[str, Activation] = {row.name: row for row in _ROWS}
_NAMED = dict(ACTIVATIONS)  # and every spelling with numbers met so far


def named(name: str) -> Activation | None:
    """The activation of this name: that of a row, or of one that takes numbers and these behind it."""
    found = _NAMED.get(name)
    return _parse(name) if found is None and isinstance(name, str) else found


def _parse(name: str) -> Activation | None:
    base, _, rest = name.partition("(")
    row = ACTIVATIONS.get(base)
    if row is None or not rest.endswith(")"):
        return None
    try:
        found = row.of(*map(float, rest[:-1].split(",")))
    except ValueError:
        return None
    return _NAMED.setdefault(name, _NAMED.setdefault(found.name, found))


def split(name: str) -> tuple[str, tuple[float, ...]]:
    """The row's name and the numbers of an activation that exists; no numbers where they are the row's."""
    row = named(name)
    if row is None:
        raise UsageError(f"there is no activation {name!r}")
    base, _, numbers = row.name.partition("(")
    return base, tuple(row.settings.values()) if numbers else ()


def choices() -> str:
    """The names there are, for messages."""
    spelled = (
        f"{row.name}({', '.join(row.settings)})" if row.numbers else row.name for row in ACTIVATIONS.values()
    )
    return f"{', '.join(ACTIVATIONS)}, or with numbers {', '.join(s for s in spelled if '(' in s)}"


# --- which activation a module or a call computes ---------------------------------------------------------

# A CPU has a kernel for each number, which takes seconds to compile: a slope that a model changes as it goes
# stays with torch.
_MOST_NUMBERS = 16


class _Family:
    """The rows of one function of torch: one row, or several that its settings tell apart."""

    def __init__(self, rows: list[Activation]) -> None:
        self.row, self.settings = rows[0], tuple(rows[0].settings)
        self.names = {tuple(row.settings.values()): row.name for row in rows}

    def name_of(self, values: tuple[Any, ...]) -> str | None:
        """The name with these settings, or None."""
        try:
            found = self.names.get(values)
        except TypeError:  # a list, or the like
            return None
        if found is None and self.row.numbers and len(self.names) < _MOST_NUMBERS:
            if not all(type(value) in (int, float) for value in values):
                return None
            try:
                row = self.row.of(*values)
            except ValueError:
                return None
            found = self.names[values] = _NAMED.setdefault(row.name, row).name
        return found

    def of_module(self, module: nn.Module) -> str | None:
        """The name of what a module with these settings computes, or None."""
        return self.name_of(tuple([getattr(module, name, None) for name in self.settings]))

    def of_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        """The name of what a call with these arguments computes, in place or not, or None."""
        names = (*self.settings, "inplace")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(args) > len(names) or len(given) < len(args) + len(kwargs) or not given.keys() <= set(names):
            return None
        values = {**self.row.settings, **given}
        values.pop("inplace", None)
        return self.name_of(tuple(values.values()))


def _families() -> tuple[dict[type[nn.Module], Any], dict[Any, tuple[str | None, _Family]]]:
    modules: dict[type[nn.Module], Any] = {}
    calls: dict[Any, tuple[str | None, _Family]] = {}
    for row in _ROWS:
        family = _Family([other for other in _ROWS if other.function is row.function])
        if row.module not in modules:
            modules[row.module] = family if row.settings else row.name
            calls |= dict.fromkeys(
                (row.function, *row.calls), (family.names.get(tuple(row.settings.values())), family)
            )
    modules[nn.ReLU6] = modules[nn.Hardtanh]  # a subclass, with the same bounds as attributes
    return modules, calls


_MODULES, _CALLS = _families()
ACTIVATION_MODULES = tuple(_MODULES)  # the classes that ``activation_of_module`` knows


def activation_of_module(module: nn.Module) -> str | None:
    """The name of the activation that a module computes, or None."""
    found = _MODULES.get(type(module))
    if found is None or type(found) is str:
        return found
    name: str | None = found.of_module(module)
    return name


def activation_of_call(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """The name of the activation that ``function(value, *args, **kwargs)`` computes, or None.

    In place or not; a string is the name of a method. The function must be hashable.
    """
    found = _CALLS.get(function)
    if found is None:
        return None
    name, family = found
    return family.of_call(args, kwargs) if args or kwargs else name


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

    def parted(self, *, numbers: bool, windows: bool) -> tuple["Epilogue", "Epilogue"]:
        """What kernels compute and what torch's operators do after them.

        Left to torch is, if asked, an activation with numbers and the pool behind it, and max pooling.
        """
        if numbers and self.activation is not None and "(" in self.activation:
            return NOTHING, self
        if windows and isinstance(self.pool, MaxPool):
            return Epilogue(self.activation), Epilogue(None, self.pool)
        return self, NOTHING

    def apply(self, out: Tensor, residual: Any = None) -> Tensor:
        """``pool(activation(out + residual))`` by torch's operators, broadcasting and promotion included."""
        if residual is not None:
            out = out + residual
        if self.activation is not None:
            row = named(self.activation)
            assert row is not None, self.activation
            out = row.apply(out)
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
        row = named(activation)  # type: ignore[arg-type]
        if row is None:
            raise UsageError(f"activation must be None or one of {choices()}; got {activation!r}")
        unpooled = _UNPOOLED[activation] = Epilogue(row.name)
    if pool is None:
        return unpooled
    if isinstance(pool, MaxPool):
        _check_windows(pool)
    elif pool != 2:
        raise UsageError(f"pool must be None, 2 (the 2x2 mean) or a MaxPool, got {pool!r}")
    return Epilogue(unpooled.activation, pool)


def _check_windows(pool: MaxPool) -> None:
    kernel, stride, padding = pool
    if any(type(n) is not int for n in pool) or kernel < 1 or stride < 1 or not 0 <= padding <= kernel // 2:
        raise UsageError(
            "MaxPool needs kernel and stride of at least 1 and padding of at most half the kernel, "
            f"got kernel={kernel!r}, stride={stride!r}, padding={padding!r}"
        )
