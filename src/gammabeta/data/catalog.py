"""From a name or a path to a data set."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from .dataset import Dataset
from .embedded import load_mnist
from .idx import is_idx_folder, read_idx_folder
from .stream import exists


@dataclass(frozen=True)
class Known:
    """A data set that has a name: one line about it, and how it is loaded."""

    about: str
    load: Callable[[], Dataset]


KNOWN = {
    "mnist": Known("handwritten digits, 60,000 + 10,000, grey 28×28, 10 classes; in the package", load_mnist),
}


def known_names() -> dict[str, str]:
    """Each name that `load` knows, with one line about it."""
    return {name: known.about for name, known in KNOWN.items()}


def load(name_or_path: str | os.PathLike[str]) -> Dataset:
    """Load a data set by name, or read it from a file or folder.

    Args:
        name_or_path: a name from `known_names`; or a folder of IDX files. A name wins over a path of the same
            spelling; write ``./mnist`` for the folder.

    Returns:
        The data set, whole, in memory.

    Raises:
        DataError: there is no such name or path, or what is there is damaged or in no known format.
    """
    if isinstance(name_or_path, str) and name_or_path in KNOWN:
        return KNOWN[name_or_path].load()
    path = Path(name_or_path).expanduser()
    if not exists(path):
        raise DataError(f"{str(path)!r}: no such data set or path; names are {', '.join(KNOWN)}")
    if path.is_dir() and is_idx_folder(path):
        return read_idx_folder(path, path.resolve().name)
    raise DataError(f"{path}: no data set found here; give a folder of IDX files")
