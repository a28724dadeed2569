"""NPZ: a zip of NumPy arrays, read without NumPy's own reader.

``numpy.load`` allocates what an array's header claims before it has seen the data, and evaluates the header
as a Python literal. Here the header must have the one form that NumPy writes, and its claim must agree with
the sizes that the zip states and with what a file of that size may unpack to.
"""

import math
import re
import struct
import zipfile
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from .arrays import splits_of
from .dataset import MAX_SIDE, Dataset, arrange
from .stream import Stream, open_zip, regular_file, unpacked_limit

MAGIC = b"\x93NUMPY"
_HEADER = re.compile(
    rb"\{'descr': '(?P<type>[|<>=][bui][1248]|[<>=|][fcSUO]\d{0,4})', "
    rb"'fortran_order': (?P<fortran>True|False), 'shape': \((?P<shape>[0-9, ]{0,200})\),? ?\} *\n"
)
_TEXT = re.compile(r"[<>=|]U\d{1,4}")
_PIXELS = re.compile(r"[|<>=](?:[ui][1248]|b1|f[248])")
_LABELS = re.compile(rf"{_PIXELS.pattern}|{_TEXT.pattern}")

#: The keys of images and labels for each part, in lower case, as different writers name them.
_KEYS: tuple[dict[str, tuple[str, str]], ...] = (
    {"train": ("x_train", "y_train"), "test": ("x_test", "y_test"), "validation": ("x_val", "y_val")},
    {
        "train": ("train_images", "train_labels"),
        "test": ("test_images", "test_labels"),
        "validation": ("val_images", "val_labels"),
    },
    {"train": ("images", "labels")},
    {"train": ("x", "y")},
)


def read_npz(path: Path, name: str) -> Dataset:
    """Read a data set from an NPZ file.

    The keys are ``x_train``, ``y_train``, ``x_test``, ``y_test`` (as Keras writes them; ``x_val``, ``y_val``
    may come too), or ``train_images``, ``train_labels`` and so on (as MedMNIST writes them), or ``images``
    and ``labels`` or ``x`` and ``y``, of which a fifth is held out for testing (see `hold_out`). What images
    and labels may be is said in `splits_of`. An optional key ``classes`` holds the classes' names.

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
        self.keys = {info.filename.removesuffix(".npy").lower(): info for info in archive.infolist()}

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
    found = next((parts for parts in map(partial(_present, archive), _KEYS) if "train" in parts), None)
    if found is None:
        held = ", ".join(map(repr, list(archive.keys)[:8])) or "nothing"
        raise DataError(
            f"{archive.path}: needs the keys x_train, y_train, x_test, y_test, or train_images, "
            f"train_labels, test_images, test_labels, or images and labels; it has {held}"
        )
    arrays = {
        part: (
            archive.array(images, _PIXELS, "images of numbers, best unsigned bytes (uint8)"),
            archive.array(labels, _LABELS, "labels that are numbers or texts"),
        )
        for part, (images, labels) in found.items()
    }
    where = str(archive.path)
    splits, classes, notes = splits_of(arrays, where, _classes(archive))
    keys = [str(number) for number in range(len(splits["train"]))]
    return arrange(name, splits, classes, keys, where, notes)


def _present(archive: _Archive, keys: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    return {part: pair for part, pair in keys.items() if all(key in archive.keys for key in pair)}


def _classes(archive: _Archive) -> tuple[str, ...]:
    if "classes" not in archive.keys:
        return ()
    found = archive.array("classes", _TEXT, "texts")
    if found.ndim != 1:
        raise DataError(f"{archive.path}: classes has shape {found.shape}, but one name a class is needed")
    return tuple(str(name) for name in found)
