"""Where the data of a run are, and whether they are what it was trained on: told by content, not path."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..data import Dataset, known_names
from ..errors import DataError
from ..text import storable


def place_of(source: str) -> str | None:
    """The absolute path of a data set; None if ``source`` is a name, which is the same everywhere."""
    return None if source in known_names() else str(Path(source).absolute())


def storable_source(source: str) -> dict[str, str | None]:
    """What a run's document says of where its data are."""
    place = place_of(source)
    return {"data": storable(source), "data_path": None if place is None else storable(place)}


def find(source: str, place: str | None) -> str:
    """Where the data of a run are today: at the ``place`` they had, else where ``source``, as given, leads.

    ``place`` None: nothing is known but ``source``. `DataError` if they are gone.
    """
    if place is None or source in known_names():
        return source
    for path in (place, source):
        if os.path.exists(path):  # noqa: PTH110 -- Path.exists raises where a name is too long
            return path
    raise DataError(f"{place}: the data of the run are not there; name their new place with --data")


def dataset_sha256(dataset: Dataset) -> str:
    """Return the SHA-256 of all images and labels."""
    digest = hashlib.sha256()
    for split in dataset.splits().values():
        digest.update(np.ascontiguousarray(split.images).data)
        digest.update(np.ascontiguousarray(split.labels).data)
    return digest.hexdigest()


def is_same(dataset: Dataset, sha256: str | None) -> bool:
    """Whether a run with this sum was trained on the data set; 0.1.0 left validation images out."""
    if sha256 == dataset_sha256(dataset):
        return True
    return dataset.validation is not None and sha256 == dataset_sha256(replace(dataset, validation=None))
