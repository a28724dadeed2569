"""Compiled kernels on disk: what is read was written whole, by this user, under this name, or is not used.

Machine code is run as it is, so a file of ours begins with the SHA-256 of its name and its content, and
neither the file nor its folder may be another user's, or open to another user's writing.
"""

import hashlib
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

from ...text import visible

_DIGEST = 32  # bytes
_PATIENCE = 60  # seconds; a kernel compiles in a few
_OPEN = "can be written by other users"


def read(path: Path) -> bytes | None:
    """The kept code, or None where it has to be compiled; says so if the file was there and is not used."""
    if blocked(path.parent) is not None:
        return None
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(handle, "rb") as file:
            why = _foreign(os.fstat(handle), folder=False)
            content = b"" if why else file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        why, content = f"cannot be read: {error.strerror}", b""
    if why is None and content[:_DIGEST] == _digest(path, content[_DIGEST:]):
        return content[_DIGEST:]
    tell("anew", f"compiling kernels anew: {path} {why or 'is damaged'}")
    return None


def keep(path: Path, code: bytes) -> None:
    """Write the file whole or not at all; a cache that cannot be written costs time, not the result."""
    if blocked(path.parent) is not None:
        return
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_digest(path, code) + code)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        _tell_each_start(path.parent, error.strerror)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait while another process makes this file: the ranks of a training want the same ones at once."""
    from filelock import FileLock, Timeout

    with ExitStack() as stack:
        if blocked(path.parent) is None and _unwritable(path.parent) is None:
            with suppress(OSError, Timeout):  # nothing is wrong if two compile, only slower
                stack.enter_context(FileLock(mark := path.with_suffix(".lock"), timeout=_PATIENCE))
                stack.callback(mark.unlink, missing_ok=True)
        yield


def tell_compiling(directory: Path) -> None:
    """Say once per process why the first step takes seconds, and whether it will again."""
    why = blocked(directory) or _unwritable(directory)
    if why is None:
        tell("compiling", f"compiling kernels (once per machine; cached in {directory})")
    else:
        _tell_each_start(directory, why)


def tell(kind: str, line: str) -> None:
    """Print a line on standard error, of each kind one per process."""
    if kind not in _told:
        _told.update({kind, "compiling"})
        print(f"gammabeta: {visible(line)}", file=sys.stderr, flush=True)


def hush(quiet: bool = True) -> bool:
    """If ``quiet``, compiling is not told, only what keeps kernels from being kept. Returns ``quiet``."""
    _told.update({"compiling"} if quiet else ())
    return quiet


_told: set[str] = set()


def _tell_each_start(directory: Path, why: str | None) -> None:
    tell(
        "unkept",
        f"compiling kernels at each start, because they cannot be kept in {directory} ({why}); "
        "NUMBA_CACHE_DIR names another folder",
    )


@cache
def blocked(directory: Path) -> str | None:
    """Why nothing is read from or written to a folder, made if need be; None if it can be trusted."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        why = _foreign(directory.stat(), folder=True)
        if why == _OPEN:  # it is ours: close it, and trust nothing that was put there before
            directory.chmod(0o700)
            for path in directory.glob("*.o"):
                path.unlink(missing_ok=True)
            tell("anew", f"compiling kernels anew: others could write in {directory}, now they cannot")
            return None
    except OSError as error:
        return error.strerror or str(error)
    return why


@cache
def _unwritable(directory: Path) -> str | None:
    try:
        with tempfile.TemporaryFile(dir=directory):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _foreign(found: os.stat_result, *, folder: bool) -> str | None:
    """Why the code could be somebody else's; None if only this user and root can have written it."""
    if not (stat.S_ISDIR if folder else stat.S_ISREG)(found.st_mode):
        return "is not a folder" if folder else "is not a plain file"
    if not hasattr(os, "geteuid"):  # Windows keeps a user's folders from others by other means
        return None
    if found.st_uid != os.geteuid():
        return "belongs to another user"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return _OPEN
    return None


def _digest(path: Path, code: bytes) -> bytes:
    return hashlib.sha256(path.name.encode() + b"\0" + code).digest()
