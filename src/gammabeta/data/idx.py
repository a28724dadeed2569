"""IDX, the format of MNIST and its relatives, raw or gzip.

A file is a magic number (two zero bytes, the type of an item, the number of dimensions), each dimension as a
big-endian 32-bit integer, then the items, last dimension fastest. We read unsigned bytes (type 0x08), which
is what images and labels come in. Described by LeCun, Cortes and Burges, "The MNIST database of handwritten
digits".
"""

import math
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from .arrays import splits_of
from .dataset import MAX_SIDE, Dataset, arrange
from .emnist import is_emnist, names_of, upright
from .stream import Stream, itself, listing, open_stream, read_text

UNSIGNED_BYTE = 0x08
_TYPES = {0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}
_NAMES = {
    # train-images-idx3-ubyte, train-images.idx3-ubyte, emnist-letters-train-images-idx3-ubyte, each also .gz
    ("train", "images"): re.compile(r"(.*[-_])?train-images[-.]idx3-ubyte(\.gz)?", re.ASCII),
    ("train", "labels"): re.compile(r"(.*[-_])?train-labels[-.]idx1-ubyte(\.gz)?", re.ASCII),
    ("test", "images"): re.compile(r"(.*[-_])?(t10k|test)-images[-.]idx3-ubyte(\.gz)?", re.ASCII),
    ("test", "labels"): re.compile(r"(.*[-_])?(t10k|test)-labels[-.]idx1-ubyte(\.gz)?", re.ASCII),
}


def read_idx(path: str | os.PathLike[str], *, dimensions: int) -> npt.NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes.

    Args:
        path: the file, raw or gzip (told by its content).
        dimensions: how many it must have: 3 for images (N, H, W), 1 for labels (N,).

    Returns:
        A writable, C-contiguous uint8 array of the shape the file states.

    Raises:
        DataError: the file is missing, is not IDX, holds another type or number of dimensions, is empty, is
            cut short or too long, states a size that it cannot hold, or its gzip checksum is wrong.
    """
    with open_stream(path) as stream:
        return read_idx_stream(stream, dimensions)


def read_idx_stream(stream: Stream, dimensions: int) -> npt.NDArray[np.uint8]:
    """As `read_idx`, from a stream that is open already."""
    shape = _header(stream, dimensions)
    items = np.empty(shape, np.uint8)
    stream.fill(items.reshape(-1).data, "its items")
    stream.end()
    return items


def write_idx(path: str | os.PathLike[str], items: npt.NDArray[np.uint8]) -> None:
    """Write a uint8 array as a raw IDX file, the counterpart of `read_idx`."""
    if items.dtype != np.uint8:
        raise DataError(f"{path}: only uint8 is written as IDX, got {items.dtype}")
    header = struct.pack(f">HBB{items.ndim}I", 0, UNSIGNED_BYTE, items.ndim, *items.shape)
    Path(path).write_bytes(header + items.tobytes())


def read_idx_folder(folder: Path, name: str, classes: Sequence[str] = ()) -> Dataset:
    """Read the four files of a data set: train-/t10k- images-idx3-ubyte and labels-idx1-ubyte, raw or .gz.

    ``test-`` stands for ``t10k-`` too, a dot for the hyphen before ``idx``, and a prefix
    (``emnist-letters-``) may come first. A file may lie in a folder of its own name. If it is there several
    times, the raw one is read. With the prefix ``emnist-`` images are turned upright, as in EMNIST's zip.

    ``classes`` names the labels from 0; else a file ``classes.txt`` may, one name a line; else a class is
    called as its label is.
    """
    arrays = {part: _arrays(folder, part) for part in ("train", "test")}
    file = _find(folder, "train", "images")
    names: Sequence[str] | dict[int, str] = classes or _names(folder)
    if is_emnist(file.name):
        arrays = {part: (upright(images), labels) for part, (images, labels) in arrays.items()}
        names = names or names_of(file.name, arrays["train"][1])
    splits, found, _ = splits_of(arrays, str(folder), names)
    return arrange(name, splits, found, (), str(folder))


def is_idx_folder(folder: Path) -> bool:
    """Whether ``folder`` holds training images under one of the usual IDX names."""
    return any(_NAMES["train", "images"].fullmatch(entry.name) for entry in listing(folder))


def _names(folder: Path) -> tuple[str, ...]:
    file = folder / "classes.txt"
    lines = read_text(file).splitlines() if file.is_file() else []
    return tuple(line.strip() for line in lines if line.strip())


def _header(stream: Stream, dimensions: int) -> tuple[int, ...]:
    path = stream.path
    zeros, kind, count = struct.unpack(">HBB", stream.read(4, "the magic number"))
    if zeros != 0 or kind not in (UNSIGNED_BYTE, *_TYPES) or count == 0:
        raise DataError(f"{path}: not an IDX file (its first bytes are not IDX's magic number)")
    if kind != UNSIGNED_BYTE:
        raise DataError(f"{path}: IDX items of type {_TYPES[kind]}; save them as unsigned bytes (0x08)")
    if count != dimensions:
        what = {1: "labels", 3: "images"}.get(dimensions, "items")
        raise DataError(f"{path}: {count} dimensions, but {what} have {dimensions}; is it the right file?")
    shape = struct.unpack(f">{count}I", stream.read(4 * count, "the dimensions"))
    if 0 in shape or max(shape[1:], default=1) > MAX_SIDE:
        raise DataError(f"{path}: states a size of {shape}; sides go from 1 to {MAX_SIDE} pixels")
    need, room = math.prod(shape), stream.limit
    if not stream.packed and 4 + 4 * count + need != room:
        raise DataError(
            f"{path}: states a size of {shape}, {4 + 4 * count + need} bytes in all, but has {room}; "
            "copy or download it again"
        )
    if need > room:
        raise DataError(
            f"{path}: states a size of {shape}, more than a file this small may unpack to ({room})"
        )
    return shape


def _arrays(folder: Path, part: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    images = read_idx(_find(folder, part, "images"), dimensions=3)
    path = _find(folder, part, "labels")
    labels = read_idx(path, dimensions=1)
    if len(images) != len(labels):
        raise DataError(
            f"{path}: {len(labels)} labels for {len(images)} {part} images; the files do not match"
        )
    return images, labels


def _find(folder: Path, part: str, kind: str) -> Path:
    pattern = _NAMES[part, kind]
    found: dict[str, list[Path]] = {}  # files that are the same but for packing, dot or hyphen, and place
    for entry in listing(folder):
        if pattern.fullmatch(entry.name):
            plain = entry.name.removesuffix(".gz").replace(".idx", "-idx")
            found.setdefault(plain, []).append(itself(entry))
    if len(found) == 1:
        (files,) = found.values()
        # A raw file beside its packed form: either will do, the raw one needs no unpacking.
        return min(files, key=lambda file: (file.suffix == ".gz", len(file.parts), file.name))
    dimensions = 3 if kind == "images" else 1
    usual = f"{'train' if part == 'train' else 't10k'}-{kind}-idx{dimensions}-ubyte"
    if not found:
        raise DataError(f"{folder}: {usual} (or {usual}.gz) is missing; put it beside the other files")
    raise DataError(f"{folder}: several files could be {usual}: {', '.join(sorted(found))}; keep one")
