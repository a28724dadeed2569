"""Batch normalization on the CPU: what ``gammabeta.kernels`` promises, in Numba."""

from .host import (
    backward,
    backward_apply,
    backward_reduce,
    codes_of,
    forward,
    forward_train,
    statistics,
    unsupported,
    update_running,
)

__all__ = [
    "backward",
    "backward_apply",
    "backward_reduce",
    "codes_of",
    "forward",
    "forward_train",
    "statistics",
    "unsupported",
    "update_running",
]
