"""Files from the network: checked, kept, continued where they stopped, and from more than one place.

pooch keeps the files and compares each with its SHA-256 before anybody reads it, on every use. What pooch
does not do is done here: a download that was cut off goes on where it stopped (HTTP Range), never grows
past the size it must have, and moves on to the next mirror when one does not answer or sends something
else.
"""

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import DataError
from .stream import reason

#: Called with a file's name, the bytes that are here, and the bytes there will be.
Progress = Callable[[str, int, int], None]

#: Seconds without a byte after which a mirror is given up.
TIMEOUT = 30.0

#: How often a connection that breaks is taken up again before the next mirror is tried.
ATTEMPTS = 5

_PIECE = 1 << 18


@dataclass(frozen=True)
class RemoteFile:
    """A file somewhere else: its name, its size in bytes, its SHA-256, and addresses it can be had from."""

    name: str
    size: int
    sha256: str
    urls: tuple[str, ...]


def cache_folder(name: str) -> Path:
    """Where the files of data set ``name`` are kept: ``$GAMMABETA_CACHE``, or the user's cache folder."""
    given = os.environ.get("GAMMABETA_CACHE")
    if given:
        return Path(given).expanduser() / name
    from platformdirs import user_cache_path

    return user_cache_path("gammabeta", appauthor=False) / name


def fetch(
    files: Sequence[RemoteFile], dataset: str, *, folder: Path | None = None, progress: Progress | None = None
) -> Path:
    """Make sure that ``files`` are in the cache, whole and unchanged, and return their folder.

    A file that is there with the right SHA-256 is used as it is, wherever it came from; nothing is asked of
    the network then.

    Raises:
        DataError: a file is neither here nor to be had; the message says what to download, and where to put
            it.
    """
    folder = folder or cache_folder(dataset)
    for file in files:
        _fetch_one(file, files, dataset, folder, progress)
    return folder


def _fetch_one(
    file: RemoteFile, files: Sequence[RemoteFile], dataset: str, folder: Path, progress: Progress | None
) -> None:
    failures: list[str] = []
    for url in file.urls:
        download = _Download(file, folder, progress)
        while True:
            try:
                _retrieve(file, url, folder, download)
            except (OSError, http.client.HTTPException, ValueError) as error:
                if isinstance(error, ValueError) and download.resumed:
                    download = _Download(file, folder, progress)  # the old beginning may be what was wrong
                    continue
                failures.append(_why(error))
                break
            return
    # One line, and everything needed to mend it by hand.
    names = ", ".join(other.name for other in files)
    place = file.urls[0].rpartition("/")[0]
    raise DataError(
        f"{dataset}: {file.name} cannot be downloaded ({'; '.join(dict.fromkeys(failures))}); "
        f"download {names} from {place}/ and put them into {folder}"
    )


def _retrieve(file: RemoteFile, url: str, folder: Path, download: "_Download") -> None:
    import logging

    import pooch

    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel(logging.WARNING)  # progress is the caller's to show
    try:
        pooch.retrieve(url, f"sha256:{file.sha256}", fname=file.name, path=folder, downloader=download)
    finally:
        logger.setLevel(level)


def _why(error: BaseException) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code}"
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        return reason(error.reason)
    if isinstance(error, ValueError):
        return "its SHA-256 is not the one expected"
    return reason(error)


class _Download:
    """What pooch calls to bring one address's content into a file of its choice."""

    def __init__(self, file: RemoteFile, folder: Path, progress: Progress | None) -> None:
        self.resumed = False
        self._file = file
        self._part = folder / f"{file.name}.part"
        self._progress = progress

    def __call__(self, url: str, output_file: str, _pooch: object) -> None:
        part = _open_part(self._part)
        here = Path(part.name)
        try:
            with part:
                self.resumed = part.seek(0, os.SEEK_END) > 0
                self._persist(url, part)
            here.replace(output_file)
        finally:
            if here != self._part:
                here.unlink(missing_ok=True)

    def _persist(self, url: str, part: BinaryIO) -> None:
        """Take a connection that breaks up again, as long as each one brings something."""
        for attempt in range(ATTEMPTS):
            before = part.seek(0, os.SEEK_END)
            try:
                return self._continue(url, part)
            except urllib.error.HTTPError:
                raise
            except (OSError, http.client.HTTPException):
                if attempt + 1 == ATTEMPTS or part.seek(0, os.SEEK_END) <= before:
                    raise
        return None

    def _continue(self, url: str, part: BinaryIO) -> None:
        """Ask for what is missing from ``part`` and append it."""
        have, size = part.seek(0, os.SEEK_END), self._file.size
        if have > size:
            have = part.truncate(0)
        if have == size:
            return
        headers = {"User-Agent": "gammabeta", "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            begins = answer.headers.get("Content-Range", "")
            continues = answer.status == http.client.PARTIAL_CONTENT and begins.startswith(f"bytes {have}-")
            if not continues:
                have = part.truncate(0)  # this server sends the whole file, whatever it is asked for
            part.seek(have)
            while piece := answer.read(_PIECE):
                have += len(piece)
                if have > size:
                    part.truncate(0)
                    raise OSError(f"it sends more than the {size} bytes expected")
                part.write(piece)
                if self._progress is not None:
                    self._progress(self._file.name, have, size)
        if have < size:
            raise OSError(f"the connection broke off after {have} of {size} bytes")


def _open_part(part: Path) -> BinaryIO:
    """Open the unfinished file for this process alone; a second process gets a file of its own beside it."""
    opened = part.open("a+b")  # what is written goes to the end
    try:
        import fcntl

        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return opened  # no such locks on this system
    except OSError:
        opened.close()
        return part.with_name(f"{part.name}.{os.getpid()}").open("w+b")
    return opened
