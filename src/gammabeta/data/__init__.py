"""Images and labels as checked uint8 arrays, from wherever they come.

``load("mnist")`` needs no network: MNIST is inside the package. Nothing here imports torch.
"""

from .catalog import known_names, load, picture_style
from .dataset import Dataset, Split
from .idx import read_idx, write_idx
from .preparation import Preparation, load_picture

__all__ = [
    "Dataset",
    "Preparation",
    "Split",
    "known_names",
    "load",
    "load_picture",
    "picture_style",
    "read_idx",
    "write_idx",
]
