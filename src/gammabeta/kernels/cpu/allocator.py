"""Memory for large outputs: lent, and taken back when the last tensor on it is gone.

A fresh block costs a page fault per 4 KiB at its first touch, more than computing what is written there, and
the C library returns large blocks to the system whenever they are freed: a training loop would pay for each
output at every step. The blocks here stay with the process, on pages of 2 MiB where Linux has them. Idle ones
are kept up to half as much again as was ever in use at once: outputs of several sizes have their peaks at
different times. ``keep_pages`` does as much for all other memory while a network trains.
"""

import contextlib
import ctypes
import mmap
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LARGE = 4 << 20  # bytes from which an output is lent a block
_PAGE = 4096
_SLACK = 1.25  # a block may be that much larger than what is wanted
_KEPT = 1.5  # idle bytes at most, by the most bytes in use at once

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = {_M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 1 << 30}  # bytes; 32 MiB is glibc's limit
_AFTERWARDS = {_M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 64 << 20}


class _Lent(np.ndarray[Any, Any]):
    """The bytes of a block while a storage holds them; afterwards the block goes ``home``."""

    block: mmap.mmap
    home: deque[mmap.mmap]

    def __del__(self) -> None:
        if "home" in self.__dict__:
            self.home.append(self.block)


class _Pool:
    """Idle blocks by their size, the sizes least recently used first."""

    def __init__(self) -> None:
        # Blocks come back from any thread at any moment; they are sorted in when one is lent.
        self.returned: deque[mmap.mmap] = deque()
        self.lock = threading.Lock()
        self.idle: dict[int, list[mmap.mmap]] = {}
        self.idle_bytes = self.lent_bytes = self.most_lent = 0

    def lend(self, nbytes: int) -> _Lent:
        size = -(-nbytes // _PAGE) * _PAGE
        with self.lock:
            self._sort_in()
            block = self._take(size)
            self.lent_bytes += len(block)
            self.most_lent = max(self.most_lent, self.lent_bytes)
        lent = _Lent((nbytes,), np.uint8, block)
        lent.block, lent.home = block, self.returned
        return lent

    def release(self) -> None:
        """Give the idle blocks back to the system."""
        with self.lock:
            self._sort_in()
            self._drop_until(0)

    def _sort_in(self) -> None:
        while self.returned:
            block = self.returned.popleft()
            size = len(block)
            self.idle[size] = [*self.idle.pop(size, ()), block]
            self.idle_bytes += size
            self.lent_bytes -= size
        self._drop_until(_KEPT * self.most_lent)

    def _drop_until(self, most: float) -> None:
        while self.idle_bytes > most:
            size, blocks = next(iter(self.idle.items()))
            blocks.pop(0)
            self.idle_bytes -= size
            if not blocks:
                del self.idle[size]

    def _take(self, size: int) -> mmap.mmap:
        """An idle block of that size, of about that size, or a new one."""
        if size not in self.idle:
            fits = [s for s in self.idle if size < s <= _SLACK * size]
            if not fits:
                return self._map(size)
            size = min(fits)
        blocks = self.idle.pop(size)
        block = blocks.pop()  # the last used is the likeliest to be in the caches
        if blocks:
            self.idle[size] = blocks
        self.idle_bytes -= size
        return block

    def _map(self, size: int) -> mmap.mmap:
        # Private: a child made by fork gets copies, as of all other memory.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        try:
            block = mmap.mmap(-1, size, **private)
        except OSError:
            self._drop_until(0)
            block = mmap.mmap(-1, size, **private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a system without them
                block.madvise(mmap.MADV_HUGEPAGE)
        return block


_pool = _Pool()


def empty_like(x: Tensor) -> Tensor:
    """``torch.empty_like(x)`` for a dense ``x``, in a block of ours if it is large.

    Such a tensor is an ordinary one, but for its storage, which cannot be resized.
    """
    nbytes = x.numel() * x.element_size()
    if nbytes < _LARGE:
        return torch.empty_like(x)
    storage = torch.from_numpy(_pool.lend(nbytes)).untyped_storage()
    return torch.empty(0, dtype=x.dtype).set_(storage, 0, x.shape, x.stride())


def release() -> None:
    """Give the memory that no tensor uses back to the system."""
    _pool.release()


def _after_fork() -> None:
    """In a child: another thread may have held the lock when the process was copied."""
    _pool.lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# --- all other memory -------------------------------------------------------------------------------------


@contextlib.contextmanager
def keep_pages() -> Iterator[None]:
    """Let freed blocks of up to 32 MiB stay with the process; what is free at the end goes to the system.

    glibc returns the pages of large blocks to the system at every free, and the next allocation pays for page
    faults. Two thresholds decide this (``mallopt(3)``), and are raised for a while. Setting one ends glibc's
    own adjustment of it: afterwards the two stay where that adjustment ends in a process that frees large
    blocks, not at the 128 KiB it begins with, which would cost whatever the process does next a page fault
    for every page of every tensor. Does nothing where the C library is not glibc.
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
