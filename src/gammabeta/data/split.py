"""Hold images out for testing, the same ones each time."""

import hashlib
from collections.abc import Sequence

import numpy as np

from ..errors import DataError
from .dataset import Split

#: The share of each class that is held out.
SHARE = 0.2


def hold_out(whole: Split, keys: Sequence[str], where: str) -> tuple[Split, Split]:
    """Hold a fifth of each class out for testing, at least one image of it.

    Which ones is decided by the SHA-256 of each image's key (its path, or its number), so it depends
    neither on the machine nor on a seed, and an image keeps its side, nearly always, when others are added.

    Args:
        whole: all images.
        keys: a text for each image, all different.
        where: the file or folder, for the error.

    Raises:
        DataError: a class has one image only, which cannot both teach and test.
    """
    digests = np.array([hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest() for key in keys])
    held = np.zeros(len(whole), bool)
    for label in np.unique(whole.labels):
        members = np.flatnonzero(whole.labels == label)
        if len(members) < 2:
            raise DataError(f"{where}: class {label} has one image; a class needs two, one to test with")
        count = max(1, round(SHARE * len(members)))
        held[members[np.argsort(digests[members], kind="stable")[:count]]] = True
    return _part(whole, ~held), _part(whole, held)


def _part(whole: Split, chosen: np.ndarray) -> Split:
    return Split(whole.images[chosen], whole.labels[chosen])
