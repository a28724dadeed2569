"""NPZ: a zip of NumPy arrays, read without NumPy's own reader.

``numpy.load`` allocates what an array's header claims before it has seen the data, and evaluates the header
as a Python literal. Here the header must have the one form that NumPy writes, and its claim must agree with
the sizes that the zip states and with what a file of that size may unpack to.
"""

import math
import re
import struct
import zipfile
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from .dataset import MAX_SIDE, Dataset, Split, hold_out
from .stream import Stream, open_zip, regular_file, unpacked_limit

MAGIC = b"\x93NUMPY"
_HEADER = re.compile(
    rb"\{'descr': '(?P<type>[|<>=][bui][1248]|[<>=|][fcSUO]\d{0,4})', "
    rb"'fortran_order': (?P<fortran>True|False), 'shape': \((?P<shape>[0-9, ]{0,200})\),? ?\} *\n"
)
_INTEGERS = re.compile(r"[|<>=][ui][1248]")
_TEXT = re.compile(r"[<>=|]U\d{1,4}")
_KEYS = ("x_train", "y_train", "x_test", "y_test")


def read_npz(path: Path, name: str) -> Dataset:
    """Read a data set from an NPZ file.

    The keys are ``x_train``, ``y_train``, ``x_test``, ``y_test`` (as Keras writes them), or ``images`` and
    ``labels``, of which a fifth is held out for testing (see `hold_out`). Images are uint8 of shape (N, H,
    W), (N, H, W, C) or (N, C, H, W) with C = 1 or 3; labels are integers of shape (N,) or (N, 1), from 0.
    An optional key ``classes`` holds the classes' names; without it, class ``i`` is called ``str(i)``.

    Raises:
        DataError: no zip, a key is missing, an array is of another type or shape (pickled objects are never
            opened), damaged, larger than the file plausibly holds, or the arrays do not fit together.
    """
    with open_zip(path, "NPZ file", "copy or save it again") as archive:
        return _read(_Archive(path, archive, unpacked_limit(regular_file(path))), name)


class _Archive:
    """The arrays of an NPZ file, which may not unpack to more than ``room`` bytes together."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, room: int) -> None:
        self.path = path
        self._archive = archive
        self._room = room
        self.keys = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}

    def array(self, key: str, wanted: re.Pattern[str], what: str) -> npt.NDArray[np.generic]:
        """Array ``key``, if its type is ``wanted``, which in words is ``what``."""
        info = self.keys[key]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"{self.path}: {key} is packed in a way that NumPy does not use; save it again")
        self._room -= info.file_size
        if self._room < 0:
            raise DataError(f"{self.path}: {key} unpacks to more than a file of its size plausibly holds")
        with cast("zipfile.ZipExtFile", self._archive.open(info)) as member:
            # readinto of the member is what checks the checksum, at its end.
            stream = Stream(self.path / key, member, info.file_size, packed=True)
            return _read_npy(stream, wanted, what)


def _read_npy(stream: Stream, wanted: re.Pattern[str], what: str) -> npt.NDArray[np.generic]:
    """One array, from its own small header."""
    if stream.read(6, "the magic number") != MAGIC:
        raise DataError(f"{stream.path}: not a NumPy array")
    version = stream.read(2, "the version")[0]
    if version not in (1, 2):
        raise DataError(f"{stream.path}: a NumPy array of an unknown version; save it with numpy.savez")
    field = "<H" if version == 1 else "<I"
    (length,) = struct.unpack(field, stream.read(struct.calcsize(field), "the header's length"))
    header = _HEADER.fullmatch(stream.read(length, "the header")) if length <= 4096 else None
    if header is None:
        raise DataError(f"{stream.path}: its header is not one that NumPy writes for a plain array")
    kind = header["type"].decode()
    if not wanted.fullmatch(kind):
        hint = "; pickled objects are never read" if "O" in kind else ""
        raise DataError(f"{stream.path}: of type {kind!r}, but {what} are needed{hint}")
    shape = tuple(int(length) for length in header["shape"].decode().replace(",", " ").split())
    dtype, count = np.dtype(kind), math.prod(shape)
    need = stream.taken + count * dtype.itemsize
    if len(shape) > 4 or max(shape[1:], default=1) > MAX_SIDE or need != stream.limit:
        raise DataError(
            f"{stream.path}: its header states a shape of {shape}, but there are {stream.limit} bytes"
        )
    items = np.empty(count, dtype)
    stream.fill(items.view(np.uint8).data, "its items")
    stream.end()
    return items.reshape(shape[::-1]).T if header["fortran"] == b"True" else items.reshape(shape)


def _read(archive: _Archive, name: str) -> Dataset:
    classes = _classes(archive)
    if all(key in archive.keys for key in _KEYS):
        train = Split(_images(archive, "x_train"), _labels(archive, "y_train"))
        test = Split(_images(archive, "x_test"), _labels(archive, "y_test"))
    elif "images" in archive.keys and "labels" in archive.keys:
        images, labels = _images(archive, "images"), _labels(archive, "labels")
        whole = Split(images, labels)
        train, test = hold_out(whole, [str(number) for number in range(len(whole))], str(archive.path))
    else:
        found = ", ".join(list(archive.keys)[:8]) or "nothing"
        raise DataError(
            f"{archive.path}: needs the keys {', '.join(_KEYS)}, or images and labels; it has {found}"
        )
    count = int(train.labels.max()) + 1
    return Dataset(name, train, test, classes or tuple(str(number) for number in range(count)))


def _classes(archive: _Archive) -> tuple[str, ...] | None:
    if "classes" not in archive.keys:
        return None
    found = archive.array("classes", _TEXT, "texts")
    if found.ndim != 1:
        raise DataError(f"{archive.path}: classes has shape {found.shape}, but one name a class is needed")
    return tuple(str(name) for name in found)


def _images(archive: _Archive, key: str) -> npt.NDArray[np.uint8]:
    found = archive.array(key, re.compile(r"[|<>=]u1"), "images of unsigned bytes (uint8, 0 to 255)")
    shape = found.shape
    if found.ndim == 3:
        found = found[:, np.newaxis]
    elif found.ndim == 4 and shape[3] in (1, 3):
        found = found.transpose(0, 3, 1, 2)
    elif found.ndim != 4 or shape[1] not in (1, 3):
        raise DataError(
            f"{archive.path}: {key} has shape {shape}; needed is (N, H, W), (N, H, W, C) or "
            "(N, C, H, W) with C 1 or 3"
        )
    return np.ascontiguousarray(found, np.uint8)


def _labels(archive: _Archive, key: str) -> npt.NDArray[np.int64]:
    found = archive.array(key, _INTEGERS, "labels of an integer type")
    if found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.ndim != 1:
        raise DataError(f"{archive.path}: {key} has shape {found.shape}, but one label an image is needed")
    return np.ascontiguousarray(found).astype(np.int64)
