"""Parquet, as the Hub stores image data: a row for each image, its label, and the picture as a file's bytes.

Pictures may be bytes, structs with a field ``bytes``, or lists of numbers. Reading needs pyarrow, the extra
``parquet``.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError, UnavailableError
from .arrays import splits_of
from .dataset import Dataset, arrange
from .decode import Encoded
from .folder import Entry, Reading, read_pictures
from .parts import part_of_file, part_of_folder
from .stream import MAX_BYTES, itself, listing, reason, regular_file

_SUFFIXES = (".parquet", ".pq")
_IMAGES = ("image", "images", "img", "pixel_values", "pixels", "picture", "x")
_LABELS = ("label", "labels", "class", "target", "fine_label", "y")

_Labels = npt.NDArray[np.generic]


def is_parquet(path: Path) -> bool:
    """Whether a file is called as Parquet files are."""
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")


def parquet_in(folder: Path) -> list[Path]:
    """The Parquet files of a folder: in it, or in folders right below it, as in a copy of a repository."""
    found = [path for path in map(itself, listing(folder)) if is_parquet(path)]
    below = (entry for entry in listing(folder) if entry.is_dir() and not entry.name.startswith("."))
    return found or [path for entry in below for path in listing(entry) if is_parquet(path)]


def read_parquet(paths: Sequence[Path], where: Path, name: str, how: Reading) -> Dataset:
    """Read Parquet files; what each is for (train, test, validation) stands in its name or its folder's.

    Several files of one part are its shards, in the order of their names. Without a part for testing a fifth
    is held out. The labels are numbers or texts; names of numbers are taken from the Hub's notes in the file.

    Raises:
        UnavailableError: pyarrow is not installed.
        DataError: damaged, or no column of images or of labels is found, or they are of another type.
    """
    shards: dict[str, list[tuple[Any, _Labels]]] = {}
    folders: dict[str, Path] = {}
    names: Sequence[str] = ()
    for path in paths:
        part = part_of_file(path.name) or part_of_folder(path.parent.name) or "train"
        if folders.setdefault(part, path.parent) != path.parent:  # two configurations of one repository
            raise DataError(
                f"{where}: both {folders[part].name} and {path.parent.name} are for {part}; name one"
            )
        images, labels, found = _columns(path)
        shards.setdefault(part, []).append((images, labels))
        names = names or found
    if "train" not in shards:
        raise DataError(f"{where}: no Parquet file is for training; let the name of one say train")
    whole = {part: np.concatenate([each for _, each in found]) for part, found in shards.items()}
    hidden = [part for part, found in whole.items() if part != "train" and _hidden(found)]
    columns = {part: [images for images, _ in found] for part, found in shards.items() if part not in hidden}
    labelled = {part: whole[part] for part in columns}
    dataset = _assembled(columns, labelled, names, (where, name), how)
    told = [f"{where}: the labels for {part} are hidden (all -1); it is passed over" for part in hidden]
    return replace(dataset, notes=(*dataset.notes, *told))


def _assembled(
    columns: dict[str, list[Any]],
    labels: dict[str, _Labels],
    names: Sequence[str],
    called: tuple[Path, str],
    how: Reading,
) -> Dataset:
    where, name = called
    encoded = {part: [isinstance(images, list) for images in found] for part, found in columns.items()}
    if all(chain(*encoded.values())):
        return _pictures(columns, labels, names, called, how)
    if any(chain(*encoded.values())):
        raise DataError(f"{where}: pictures are files in some Parquet files and numbers in others")
    arrays = {part: (np.concatenate(found), labels[part]) for part, found in columns.items()}
    splits, classes, notes = splits_of(arrays, str(where), names)
    keys = [str(number) for number in range(len(splits["train"]))]
    return arrange(name, splits, classes, keys, str(where), notes)


def _pictures(
    columns: dict[str, list[list[Encoded]]],
    labels: dict[str, _Labels],
    names: Sequence[str],
    called: tuple[Path, str],
    how: Reading,
) -> Dataset:
    where, name = called
    blank = {part: (np.zeros((len(own), 1, 1), np.uint8), own) for part, own in labels.items()}
    numbered, classes, _ = splits_of(blank, str(where), names)
    parts = {
        part: [*map(Entry, chain(*found), numbered[part].labels.tolist())] for part, found in columns.items()
    }
    read = read_pictures(parts, str(where), classes, how)
    keys = [str(source) for source, _ in read.kept["train"]]
    return read.arranged(name, classes, keys, str(where))


def _hidden(labels: _Labels) -> bool:
    """Whether these are the labels of a competition's test set."""
    return labels.dtype.kind == "i" and bool((labels == -1).all())


def _columns(path: Path) -> tuple[Any, _Labels, Sequence[str]]:
    """Images (pictures' bytes, or an array), labels, and the names of the labels if the file has them."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UnavailableError(
            f"{path}: Parquet is read with pyarrow, which is not installed: pip install pyarrow"
        ) from None
    if regular_file(path) > MAX_BYTES:
        raise DataError(f"{path}: more than {MAX_BYTES >> 30} GB; give fewer images")
    try:
        with parquet.ParquetFile(path) as file:
            schema, groups = file.schema_arrow, file.metadata
            unpacked = sum(groups.row_group(at).total_byte_size for at in range(groups.num_row_groups))
            if unpacked > MAX_BYTES:
                raise DataError(f"{path}: unpacks to more than {MAX_BYTES >> 30} GB; give fewer images")
            images, labels = _chosen(path, schema)
            table = file.read([images, labels])
        if not table.num_rows:
            raise DataError(f"{path}: holds no rows")
        found = _images(path, table.column(images)), _labels(path, table.column(labels))
    except DataError:
        raise
    except (ArrowException, OSError, MemoryError, OverflowError, ValueError) as error:
        raise DataError(f"{path}: not an intact Parquet file ({reason(error)}); download it again") from None
    return *found, _names(schema, labels)


def _chosen(path: Path, schema: Any) -> tuple[str, str]:
    """The names of the column of images and of the column of labels."""
    lower = {name.lower(): name for name in reversed(schema.names)}
    images = next((lower[name] for name in _IMAGES if name in lower), None)
    labels = next((lower[name] for name in _LABELS if name in lower), None)
    if images is None or labels is None:
        lacking = "images (call it image)" if images is None else "labels (call it label)"
        raise DataError(f"{path}: no column of {lacking}; it has {', '.join(map(repr, schema.names[:20]))}")
    return images, labels


def _images(path: Path, column: Any) -> Any:
    from pyarrow import chunked_array, types

    if types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = chunked_array([chunk.field("bytes") for chunk in column.chunks])
    if types.is_null(column.type):
        raise DataError(f"{path}: its pictures are empty; store their bytes, not only their paths")
    if types.is_binary(column.type) or types.is_large_binary(column.type):
        # A row without bytes is an empty picture: told with the others that are damaged, or passed over.
        return [
            Encoded(f"{path}, row {row}", content or b"") for row, content in enumerate(column.to_pylist())
        ]
    return _array(path, column)


def _array(path: Path, column: Any) -> npt.NDArray[np.generic]:
    """Lists of numbers, or lists of lists, each of one length, as an array."""
    from pyarrow import types

    flat = column.combine_chunks()
    flat = getattr(flat, "storage", flat)  # the Hub's Array2D and Array3D
    shape = [len(flat)]
    while types.is_list(flat.type) or types.is_large_list(flat.type) or types.is_fixed_size_list(flat.type):
        above, flat = len(flat), flat.flatten()
        if flat.null_count or len(flat) % max(above, 1) or not len(flat):
            raise DataError(f"{path}: images of different sizes; give lists of one length")
        shape.append(len(flat) // above)
    number = types.is_integer(flat.type) or types.is_floating(flat.type)
    if len(shape) == 1 or not number:
        raise DataError(
            f"{path}: its images are of type {column.type}; needed are bytes, a struct with bytes, or lists"
        )
    return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(shape)


def _labels(path: Path, column: Any) -> _Labels:
    if column.null_count:
        raise DataError(f"{path}: {column.null_count} rows have no label")
    values = column.to_pylist()
    labels = np.array(values) if not isinstance(values[0], list) else _array(path, column)
    if labels.dtype.kind not in "biufU":
        raise DataError(f"{path}: labels of type {column.type}; needed are numbers or texts")
    return labels


def _names(schema: Any, label: str) -> Sequence[str]:
    """The classes' names that the Hub's libraries write into the schema's metadata."""
    try:
        notes = json.loads((schema.metadata or {})[b"huggingface"])
        names = notes["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()
