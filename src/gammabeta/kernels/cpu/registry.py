"""Which kernel, out of all that can be made, and the Python function that Numba compiles for it."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

# The modules whose functions make kernels; imported, and Numba with them, only to compile one.
_MAKERS = (
    "gammabeta.kernels.cpu.jit.reductions",
    "gammabeta.kernels.cpu.jit.channels_last",
    "gammabeta.kernels.cpu.jit.channels_last_backward",
    "gammabeta.kernels.cpu.jit.channels_first",
    "gammabeta.kernels.cpu.jit.channels_first_backward",
    "gammabeta.kernels.cpu.jit.masked",
    "gammabeta.kernels.cpu.jit.masked_rows",
    "gammabeta.kernels.conv.jit.gradients",
    "gammabeta.kernels.conv.jit.stem",
    "gammabeta.kernels.conv.jit.serving",
)


class Key(NamedTuple):
    """Which kernel: the name of its maker and what was fixed at compile time."""

    kernel: str
    bf16: bool = False
    activation: str | None = None
    residual: bool = False
    pool: bool | tuple[int, int, int] = False  # the mean of 2x2, or kernel, stride and padding of windows
    vectors: int = 0  # that hold the output's channels, where a kernel is made for a number of them

    @property
    def slug(self) -> str:
        """A readable part of a file's name."""
        chosen = [self.kernel, "bf16" if self.bf16 else "f32", (self.activation or "linear").replace(" ", "")]
        chosen += ["residual"] * self.residual
        if isinstance(self.pool, tuple):
            chosen.append("max{}s{}p{}".format(*self.pool))
        elif self.pool:
            chosen.append("pool")
        return "-".join([*chosen, f"v{self.vectors}"] if self.vectors else chosen)


def make(key: Key) -> tuple[Callable[..., Any], Any]:
    """The kernel ``key`` names, its storage type, activation and options fixed, and what it is handed."""
    from .jit import loads
    from .jit.activations import arithmetic_of

    storage = loads.bfloat16 if key.bf16 else loads.float32
    modules = map(import_module, _MAKERS)
    maker = next(getattr(module, key.kernel) for module in modules if hasattr(module, key.kernel))
    sizes = (key.vectors,) if key.vectors else ()
    kernel: Callable[..., Any] = maker(storage, arithmetic_of(key.activation), key.residual, key.pool, *sizes)
    return kernel, maker.record
