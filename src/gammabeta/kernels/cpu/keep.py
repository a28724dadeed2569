"""Memory that stays with the process while it trains.

glibc returns the pages of large blocks to the system at every free, and the next allocation pays for a page
fault per 4 KiB: for outputs of some megabytes that costs as much as computing them. ``keep_pages`` raises the
two thresholds that decide this (``mallopt(3)``, ``M_MMAP_THRESHOLD`` and ``M_TRIM_THRESHOLD``) for a while.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = {_M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 1 << 30}  # bytes; 32 MiB is glibc's limit
_AFTERWARDS = {_M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 64 << 20}


@contextmanager
def keep_pages() -> Iterator[None]:
    """Let freed blocks of up to 32 MiB stay with the process; what is free at the end goes to the system.

    Setting a threshold ends glibc's own adjustment of it. Afterwards the two stay where that adjustment ends
    in a process that frees large blocks, not at the 128 KiB it begins with: those would cost whatever the
    process does next a page fault for every page of every tensor. Does nothing where the C library is not
    glibc.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "gnu_get_libc_version"):
        yield
        return
    for option, size in _LARGEST_KEPT.items():
        library.mallopt(option, size)  # type: ignore[union-attr]
    try:
        yield
    finally:
        for option, size in _AFTERWARDS.items():
            library.mallopt(option, size)  # type: ignore[union-attr]
        library.malloc_trim(0)  # type: ignore[union-attr]
