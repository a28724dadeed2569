"""CSV: a row for each image, its label and its pixels, as Kaggle's digit recogniser has them."""

import csv
import io
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from .arrays import splits_of
from .dataset import MAX_SIDE, Dataset, arrange
from .emnist import is_emnist, names_of, upright
from .parts import part_of_file
from .stream import itself, listing, read_text, reason

_LABEL = ("label", "labels", "class", "target", "y", "digit")  # what the label's column may be called
_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")

_Table = tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]


def is_table(path: Path) -> bool:
    """Whether a file is called as CSV files are."""
    return path.name.lower().endswith(_SUFFIXES) and not path.name.startswith(".")


def tables_in(folder: Path) -> list[Path]:
    """The CSV files of a folder that say what they are for; none if it has folders (of pictures) too."""
    entries = [itself(entry) for entry in listing(folder) if not entry.name.startswith(".")]
    if any(entry.is_dir() for entry in entries):
        return []
    return [path for path in entries if is_table(path) and part_of_file(path.name)]


def read_tables(paths: list[Path], where: Path, name: str) -> Dataset:
    """Read one CSV file, or several, each of which is for training, test or validation by its name.

    A row is an image: its label, then its pixels from the top left; there are as many as in a square, in
    grey, or three times as many, red, green and blue beside each other. A first row of names may come
    before; then the label's column may also be the last. Of a single file a fifth is held out for testing. A
    test file without labels, as Kaggle's competitions have, is passed over with a note.
    """
    parts: dict[str, _Table] = {}
    notes = []
    for path in paths:
        part = (part_of_file(path.name) if len(paths) > 1 else None) or "train"
        found = _read(path, labelled=part == "train" or len(paths) == 1)
        if found is None:
            notes.append(f"{path}: has no labels, and is passed over")
        elif part in parts:
            raise DataError(f"{where}: several CSV files for {part}; keep one, or put them together")
        else:
            parts[part] = found
    file = paths[0].name
    names = names_of(file, parts["train"][1]) if "train" in parts and is_emnist(file) else {}
    splits, classes, told = splits_of(parts, str(where), names) if "train" in parts else ({}, (), [])
    keys = [str(number) for number in range(len(splits["train"]))] if splits else []
    return arrange(name, splits, classes, keys, str(where), (*notes, *told))


def _read(path: Path, *, labelled: bool) -> _Table | None:
    """Pixels, (N, pixels) or (N, H, W), and labels; None if it has no labels and need not have."""
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{path}: an empty file")
    delimiter = max(",;\t", key=lines[0].count)
    first = next(csv.reader(lines[:1], delimiter=delimiter))
    ends = {first[0].strip().lower(), first[-1].strip().lower()}
    named = not ends.isdisjoint(_LABEL) or not any(map(_is_number, first[1:]))
    at = _label_column(path, first) if named else 0
    if at is None:
        if labelled:
            raise DataError(f"{path}: no column is called label; name it, or put the label first")
        return None
    if not named and not labelled and _is_square(len(first)) and not _is_square(len(first) - 1):
        return None
    width = len(first)
    rows = lines[1:] if named else lines
    for number, row in enumerate(lines, 1):
        count = len(next(csv.reader([row], delimiter=delimiter))) if '"' in row else row.count(delimiter) + 1
        if count != width:
            raise DataError(f"{path}: {width} columns in row 1, but {count} in row {number}; repair it")
    if not rows or width - 1 > 3 * MAX_SIDE**2 or width < 2:
        raise DataError(f"{path}: {len(rows)} rows of {width} columns; give a label and pixels in each row")
    columns = range(1, width) if at == 0 else range(width - 1)
    pixels = _numbers(path, rows, delimiter, columns, 1 + named)
    labels = _labels([_cell(row, delimiter, last=at > 0) for row in rows])
    shape = _shape(pixels.shape[1])
    if shape is None:
        raise DataError(
            f"{path}: {pixels.shape[1]} pixels in a row, which are no square image, grey or in colour"
        )
    images: npt.NDArray[np.float32] = pixels.reshape(-1, *shape)
    if is_emnist(path.name) and shape[2] == 1:
        images = upright(images[..., 0])[..., np.newaxis]
    return images, labels


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _shape(pixels: int) -> tuple[int, int, int] | None:
    for channels in (1, 3):
        side = round((pixels / channels) ** 0.5)
        if side and side * side * channels == pixels:
            return side, side, channels
    return None


def _is_square(pixels: int) -> bool:
    return _shape(pixels) is not None


def _label_column(path: Path, names: list[str]) -> int | None:
    found = [at for at, name in enumerate(names) if name.strip().lower() in _LABEL]
    if not found:
        return None if _is_square(len(names)) else 0
    if len(found) > 1 or found[0] not in (0, len(names) - 1):
        raise DataError(f"{path}: the label's column must be the first or the last, and the only one")
    return found[0]


def _cell(row: str, delimiter: str, *, last: bool) -> str:
    if '"' in row:
        return next(csv.reader([row], delimiter=delimiter))[-1 if last else 0].strip()
    return (row.rpartition(delimiter)[2] if last else row.partition(delimiter)[0]).strip()


def _numbers(
    path: Path, rows: list[str], delimiter: str, columns: range, first: int
) -> npt.NDArray[np.float32]:
    try:
        return np.loadtxt(
            io.StringIO("\n".join(rows)), np.float32, comments=None, delimiter=delimiter, quotechar='"',
            usecols=columns, ndmin=2,
        )  # fmt: skip
    except ValueError as error:
        message = re.sub(r"\bat row (\d+)", lambda found: f"in row {int(found[1]) + first}", reason(error))
        raise DataError(f"{path}: {message.rstrip('.')}; a row is a label and numbers") from None


def _labels(cells: list[str]) -> npt.NDArray[np.generic]:
    if all(map(_is_number, cells)):
        return np.array(cells, np.float64)
    return np.array(cells)
