"""What a file or folder is for, by its name: to train on, to test with, or to choose the best epoch by."""

import re

from ..errors import DataError

_PARTS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "t10k": "test",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
}  # fmt: skip


def part_of_folder(name: str) -> str | None:
    """``train``, ``test`` or ``validation`` if the whole name says so, in any case; else None."""
    return _PARTS.get(name.lower())


def part_of_file(name: str) -> str | None:
    """The same if one word of the name says so: ``mnist_train.csv``, ``test-00000-of-00001.parquet``.

    A name that says two things is a `DataError`.
    """
    found = {_PARTS[word] for word in re.split(r"[^a-z0-9]+", name.lower()) if word in _PARTS}
    if len(found) > 1:
        raise DataError(f"{name}: is it for {' or '.join(sorted(found))}? Let its name say one of them")
    return found.pop() if found else None
