"""Seeds of studies on every core: a process each, since random numbers are one thread's at a time."""

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import torch

from ..errors import RunError
from .conduct import Piece, Told, measure


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measured(
    pieces: Sequence[Piece], processes: int, told: Told | None = None
) -> Iterator[tuple[Piece, dict[str, Any]]]:
    """Measure each piece and yield it with its result, as they are done; one process: here, and in order.

    ``told`` is called with 1 after every step of training, in one process only. ``RunError`` if a process
    was ended from outside.
    """
    processes = min(processes, len(pieces))
    if processes == 1:
        for piece in pieces:
            yield piece, measure(piece, told)
        return
    threads = max(1, cores() // processes)
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _begin, (threads,))
    try:
        waiting = {pool.submit(measure, piece): piece for piece in pieces}
        for done in as_completed(waiting):
            yield waiting[done], done.result()
    except BrokenProcessPool:
        raise RunError("a process that ran a study was ended; --jobs 1 needs the least memory") from None
    finally:  # also where whoever reads stops early
        pool.shutdown(wait=False, cancel_futures=True)


def _begin(threads: int) -> None:
    """A process begins: its threads, and Ctrl-C ends it without a word, as the command speaks for it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(threads)
