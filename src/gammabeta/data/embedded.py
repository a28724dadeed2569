"""MNIST, inside the package: the four original IDX files, packed with gzip and otherwise unchanged.

70,000 handwritten digits, 28×28 grey, by Y. LeCun, C. Cortes and C. J. C. Burges; see NOTICE for the licence.
`scripts/build_mnist.py` rebuilds the files.
"""

from pathlib import Path

from .dataset import Dataset
from .idx import read_idx_folder

FOLDER = Path(__file__).with_name("mnist")

#: MD5 of the original IDX files, as published.
MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def load_mnist() -> Dataset:
    """60,000 training and 10,000 test digits, (N, 1, 28, 28), classes "0" to "9"; checksums are checked."""
    return read_idx_folder(FOLDER, "mnist")
