"""Large outputs on huge pages, where the system leaves the choice to the program.

A fresh output costs a page fault for each 4 KiB at its first touch, for some megabytes more than computing
it. Linux offers pages of 2 MiB to memory that asks (``madvise(2)``, ``MADV_HUGEPAGE``): one fault for 512.
"""

import ctypes
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

_HUGE = 2 << 20
_LARGE = 2 * _HUGE  # bytes from which at least one whole huge page lies inside
_MADV_HUGEPAGE = 14


def empty_like(x: Tensor) -> Tensor:
    """``torch.empty_like(x)``, on huge pages if it is large and the system has them."""
    made = torch.empty_like(x)
    nbytes = x.numel() * x.element_size()
    if nbytes >= _LARGE:
        _advise(made.data_ptr(), nbytes)
    return made


def _advise(address: int, nbytes: int) -> None:
    """Ask for the whole huge pages inside the block; the system may refuse, which changes nothing else."""
    madvise = _madvise()
    if madvise is not None:
        start, stop = -(-address // _HUGE) * _HUGE, (address + nbytes) // _HUGE * _HUGE
        madvise(start, stop - start, _MADV_HUGEPAGE)


@cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise
