"""What is particular to EMNIST (Cohen, Afshar, Tapson and van Schaik 2017), in whatever format it comes.

Its images are transposed, a relic of how they were written, and each of its six variants counts classes in a
way of its own. The variant stands in the file's name: ``emnist-letters-train-images-idx3-ubyte``.
"""

import re
from string import ascii_lowercase, ascii_uppercase, digits
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Number = TypeVar("Number", bound=np.generic)

_NAME = re.compile(r"emnist[-_ ]([a-z]+)", re.IGNORECASE)
_MERGED = digits + ascii_uppercase + "abdefghnqrt"  # lower case that looks like upper case is in one class
_CLASSES = {
    "letters": dict(enumerate(ascii_uppercase, 1)),
    "byclass": dict(enumerate(digits + ascii_uppercase + ascii_lowercase)),
    "bymerge": dict(enumerate(_MERGED)),
    "balanced": dict(enumerate(_MERGED)),
}


def is_emnist(name: str) -> bool:
    """Whether a file of this name is EMNIST's."""
    return _NAME.match(name) is not None


def names_of(name: str, labels: npt.NDArray[np.generic]) -> dict[int, str]:
    """What the labels of the file's variant mean; nothing where they are the digits or out of range."""
    found = _NAME.match(name)
    names = _CLASSES.get(found[1].lower(), {}) if found else {}
    return names if {int(label) for label in np.unique(labels)} <= names.keys() else {}


def upright(images: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """Images (N, H, W) of EMNIST, turned as they are read."""
    return np.ascontiguousarray(images.transpose(0, 2, 1))
