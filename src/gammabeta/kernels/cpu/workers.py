"""Compile several kernels at once, in as many processes as there are cores.

Numba compiles one function at a time in a process, most of the time in Python. So each process here is sent
keys and sends machine code back; it loads no torch. `multiprocessing` is not used: it would run the user's
script again in each process.
"""

import atexit
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

from . import compiler
from .cache import tell_compiling
from .registry import Key

_MOST = 8  # processes; each holds some 100 MB
#: What every training with batch norms in float32 needs; longest first.
_ALWAYS = ("channels_last_statistics", "work", "finish_statistics", "finish_gradients", "update_running")


class _Team:
    """Processes that compile what they are asked for, each served by a thread of this one."""

    def __init__(self) -> None:
        self.size = 0
        self.done: SimpleQueue[tuple[Key, bytes] | None] = SimpleQueue()  # None: a process has ended
        self._todo: SimpleQueue[Key | None] = SimpleQueue()
        self._asked: set[Key] = set()
        self._processes: list[subprocess.Popen[bytes]] = []

    def ask(self, keys: Iterable[Key], processes: int) -> None:
        """Have kernels compiled that were not asked for yet, by at least so many processes."""
        for key in [key for key in keys if key not in self._asked]:
            self._asked.add(key)
            self._todo.put(key)
        while self.size < processes:
            self.size += 1
            self._processes.append(_started())
            Thread(target=self._serve, args=self._processes[-1:], daemon=True).start()

    def _serve(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdin is not None and process.stdout is not None  # noqa: PT018
        with suppress(OSError, EOFError, pickle.UnpicklingError), process.stdin, process.stdout:
            while (key := self._todo.get()) is not None:
                pickle.dump(tuple(key), process.stdin)
                process.stdin.flush()
                self.done.put((key, pickle.load(process.stdout)))
        self.done.put(None)

    def end(self) -> None:
        """End the processes, whatever they are at."""
        for process in self._processes:
            self._todo.put(None)
            process.kill()
            process.wait()
        self._processes.clear()


_begun: list[_Team] = []  # the team that `begin` has started


def begin() -> None:
    """Have a process compile what every training needs, while this one imports PyTorch; not beside a GPU."""
    keys = [Key(name) for name in _ALWAYS]
    if not _begun and not Path("/dev/nvidiactl").exists() and compiler.lacking(keys) == keys:
        _begun.append(_Team())
        atexit.register(_begun[0].end)
        _begun[0].ask(keys, processes=1)


def compile_all(keys: Iterable[Key], told: Callable[[int, int], None]) -> None:
    """Compile kernels and load them into this process; ``told(done, all)`` is called at first and after each.

    What a process could not compile, because it could not be started say, is compiled where it is first used.
    """
    # Those with an activation in them take longest: they go first.
    todo = sorted(keys, key=lambda key: key.activation is None)
    team = _begun.pop() if _begun else _Team()
    try:
        if count := len(todo):
            told(0, count)
            tell_compiling(compiler.cache_directory())
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            team.ask(todo, min(cores, count, _MOST))
        left, ended = set(todo), 0
        while left and ended < team.size:
            found = team.done.get()
            if found is None:
                ended += 1
            elif found[0] in left:
                compiler.accept(*found)
                left.remove(found[0])
                told(count - len(left), count)
    finally:
        team.end()


def _started() -> "subprocess.Popen[bytes]":
    package = Path(__file__).parents[3]
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "NUMBA_OPT": "0"},
        start_new_session=True,  # Ctrl-C is for the process that asked; it ends these
    )


def main() -> None:
    """Compile what standard input asks for, until it ends."""
    import gc

    gc.disable()  # Numba makes objects that stay
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else is printed is no answer
    with suppress(EOFError):
        while True:
            key = Key(*pickle.load(sys.stdin.buffer))
            pickle.dump(compiler.machine_code(key), answers)
            answers.flush()


if __name__ == "__main__":
    main()
