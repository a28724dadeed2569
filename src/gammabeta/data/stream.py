"""Bytes from a file, raw or gzip, never more of them than were allowed.

A reader must know what it will hold before it allocates. A raw file says so by its size. A gzip file does
not: deflate packs zeros a thousand to one, so a file of one megabyte may claim a gigabyte. `Stream.limit`
is the number of bytes a reader may believe in, and nothing past it is ever unpacked.
"""

import gzip
import io
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DataError

#: No array larger than this is read: everything is held in memory, on the device too.
MAX_BYTES = 4 << 30

#: A compressed file may unpack to this many bytes whatever its size …
FREE_UNPACKED = 64 << 20

#: … and beyond that to this many times its own size. MNIST's images, mostly background, reach 5.
MAX_RATIO = 100

GZIP_MAGIC = b"\x1f\x8b"

# RuntimeError (of which NotImplementedError is one) is an encrypted member; struct.error, OverflowError and
# ValueError (a name that is no text) come from fields that zipfile does not check.
_DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError,
                OverflowError, RuntimeError, ValueError)  # fmt: skip


def regular_file(path: Path) -> int:
    """The size of ``path`` in bytes; `DataError` unless it is a plain file (no folder, pipe or device)."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be reached ({reason(error)}); check the path") from None
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path}: not a plain file; give the file itself")
    return found.st_size


def listing(folder: Path) -> list[Path]:
    """What is in ``folder``, in the order of the names; `DataError` if it cannot be listed."""
    try:
        return sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({reason(error)}); check its permissions") from None


def itself(path: Path) -> Path:
    """``path``, or the file of the same name inside it, as some archives unpack."""
    inner = path / path.name
    return inner if path.is_dir() and inner.is_file() else path


def unpacked_limit(packed: int) -> int:
    """How many bytes a compressed file of ``packed`` bytes may unpack to before we call it a bomb."""
    return min(MAX_BYTES, max(FREE_UNPACKED, MAX_RATIO * packed))


def reason(error: BaseException) -> str:
    """What went wrong, in the few words of the system or library, on one line."""
    words = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(words.split())


class Stream:
    """A readable file that turns each way of being damaged into a `DataError` naming the file.

    ``limit`` is how many bytes may be believed to come: a raw file's size, or what a ``packed`` one may
    unpack to. ``taken`` is how many have been read.
    """

    def __init__(self, path: Path, file: io.BufferedIOBase, limit: int, *, packed: bool) -> None:
        self.path = path
        self.limit = limit
        self.packed = packed
        self.taken = 0
        self._file = file

    def read(self, count: int, what: str) -> bytes:
        """Exactly ``count`` bytes, which are the file's ``what``; `DataError` if it ends before."""
        buffer = bytearray(count)
        self.fill(memoryview(buffer), what)
        return bytes(buffer)

    def fill(self, buffer: memoryview, what: str) -> None:
        """Fill ``buffer`` to its last byte with the file's ``what``; `DataError` if it ends before."""
        done = 0
        while done < len(buffer):
            # Pieces small enough to stay in cache: gzip hands each one over through a copy.
            count = self._readinto(buffer[done : done + (1 << 18)])
            if count == 0:
                raise DataError(
                    f"{self.path}: cut short: {what} need {len(buffer)} bytes, found {done}; "
                    "copy or download the file again"
                )
            done += count

    def some(self, count: int) -> bytes:
        """Up to ``count`` bytes; fewer only at the end of the file; `DataError` past the limit."""
        buffer, done = bytearray(min(count, self.limit - self.taken + 1)), 0
        while got := self._readinto(memoryview(buffer)[done:]):
            done += got
        if self.taken > self.limit:
            raise DataError(f"{self.path}: unpacks to more than a file of its size plausibly holds")
        return bytes(buffer[:done])

    def end(self) -> None:
        """Check that nothing follows; for gzip this also checks the checksum of all that was read."""
        if self._readinto(memoryview(bytearray(1))):
            raise DataError(f"{self.path}: bytes are left over after its last item; the file is damaged")

    def _readinto(self, view: memoryview) -> int:
        try:
            count = self._file.readinto(view)
        except EOFError:
            raise DataError(
                f"{self.path}: the gzip data are cut short; copy or download the file again"
            ) from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                f"{self.path}: damaged gzip data ({reason(error)}); copy or download it again"
            ) from None
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({reason(error)})") from None
        self.taken += count
        return count


@contextmanager
def open_stream(path: str | os.PathLike[str]) -> Iterator[Stream]:
    """Open a plain file for reading; gzip is told by its first two bytes, not by the file's name."""
    path = Path(path)
    size = regular_file(path)
    try:
        raw = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({reason(error)}); check its permissions") from None
    with raw:
        packed = raw.read(2) == GZIP_MAGIC
        raw.seek(0)
        if packed:
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield Stream(path, unpacked, unpacked_limit(size), packed=True)
        else:
            yield Stream(path, raw, size, packed=False)


def read_text(path: Path) -> str:
    """A whole text file, raw or gzip, in UTF-8 (a byte order mark is left out) or in Latin-1."""
    with open_stream(path) as stream:
        content = stream.some(stream.limit + 1)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


@contextmanager
def open_zip(path: Path, what: str, advice: str) -> Iterator[zipfile.ZipFile]:
    """Open a zip; whatever is wrong with it, also while its members are read, is a `DataError`."""
    regular_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except DataError:
        raise
    except _DAMAGED_ZIP as error:
        raise DataError(f"{path}: not an intact {what} ({reason(error)}); {advice}") from None
