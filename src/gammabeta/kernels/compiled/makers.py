"""From a kernel's key to the Python function that Numba compiles."""

from . import (
    convolution,
    memory,
    planes,
    planes_backward,
    rows,
    rows_backward,
    serial,
    serving,
    stem,
    stem_statistics,
    weight_gradient,
)
from .activations import ACTIVATIONS
from .key import Key

_MODULES = (
    serial,
    convolution,
    weight_gradient,
    stem,
    stem_statistics,
    serving,
    rows,
    rows_backward,
    planes,
    planes_backward,
)


def make(key: Key):
    """The kernel ``key`` names, with its storage type, activation and options fixed."""
    storage = memory.bfloat16 if key.bf16 else memory.float32
    maker = next(getattr(module, key.kernel) for module in _MODULES if hasattr(module, key.kernel))
    sizes = (key.vectors,) if key.vectors else ()
    return maker(storage, ACTIVATIONS[key.activation], key.residual, key.pool, *sizes)
