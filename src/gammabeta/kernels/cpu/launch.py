"""Run the parts of a kernel on as many threads as torch uses.

Where torch brought OpenMP, the parts run on torch's own team of threads (``GOMP_parallel`` of the library
torch has loaded): a second team would fight the first, which spins for a while after every operation, for
the same cores. Elsewhere a few Python threads serve, since a compiled kernel runs without the interpreter's
lock. In a child that was forked neither exists any more, and the caller does all parts itself. However many
threads come, and whichever takes which part, the result is the same: only how the work was cut decides it.
"""

import contextlib
import ctypes
import os
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

from . import compiler
from .arguments import Job
from .registry import Key

_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int64)
_WORK = Key("work")


class _Job(ctypes.Structure):
    """A ``Job`` that keeps its arguments alive."""

    _fields_ = tuple((name, ctypes.c_char_p if name == "args" else ctypes.c_int64) for name in Job._fields)


_Team = Callable[[int, _Job, int], None]
_forked = False
_kernels: dict[Key, Callable[[bytes, int], None]] = {}


class Step(NamedTuple):
    """A kernel of a sequence: all its parts, or ``once``, as one part on the calling thread."""

    key: Key
    once: bool


def call(key: Key, args: bytes, part: int = 0) -> None:
    """Run one part of a kernel on this thread."""
    if compiler.rehearsals and compiler.left_out((key,)):
        return
    (_kernels.get(key) or _kernel(key))(args, part)


def run(steps: tuple[Step, ...], args: bytes, parts: int, threads: int) -> None:
    """Run kernels one after the other, each on up to ``threads`` threads, this one among them."""
    alone = parts == 1 or threads == 1 or _forked
    if compiler.rehearsals:
        keys = [step.key for step in steps]
        if compiler.left_out(keys if alone else [*keys, _WORK]):
            return
    for key, once in steps:
        if once:
            call(key, args)
        elif alone:
            for part in range(parts):
                call(key, args, part)
        else:
            _team()(compiler.address(_WORK), _Job(0, parts, compiler.address(key), args), threads)


def _kernel(key: Key) -> Callable[[bytes, int], None]:
    found: Callable[[bytes, int], None] = _KERNEL(compiler.address(key))
    return _kernels.setdefault(key, found)


def describe() -> str:
    """In words, which threads the kernels run on."""
    if _forked:
        return "one thread (a forked child)"
    return "torch's OpenMP team" if _openmp() else "a pool of Python threads"


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


@cache
def _team() -> _Team:
    library = _openmp()
    return _openmp_team(library) if library else _python_team


@cache
def _openmp() -> str | None:
    """The OpenMP library torch has loaded, None where there is none that offers ``GOMP_parallel``."""
    if not sys.platform.startswith("linux"):
        return None
    with contextlib.suppress(OSError):
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
        found: set[str] = set(re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)\b[^/\s]*\.so\S*)", maps))
        for path in sorted(found, key=lambda path: ("/torch" not in path, path)):
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(path).GOMP_parallel  # noqa: B018
                return path
    return None


def _openmp_team(path: str) -> _Team:
    parallel = ctypes.CDLL(path).GOMP_parallel
    parallel.restype = None
    parallel.argtypes = (ctypes.c_void_p, ctypes.POINTER(_Job), ctypes.c_uint, ctypes.c_uint)

    def run_team(work: int, job: _Job, threads: int) -> None:
        parallel(work, job, threads, 0)

    return run_team


_pool_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None


def _python_team(work: int, job: _Job, threads: int) -> None:
    """Ask a shared pool for help and start; a helper that has not started by the end is cancelled."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1), thread_name_prefix="gammabeta")
    function = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Job), ctypes.c_int64)(work)
    helpers = [_pool.submit(function, ctypes.pointer(job), 0) for _ in range(threads - 1)]
    function(ctypes.pointer(job), 0)
    for helper in helpers:
        if not helper.cancel():
            helper.result()
