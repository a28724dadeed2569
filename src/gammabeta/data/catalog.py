"""From a name or a path to a data set.

MNIST is inside the package: the four original IDX files, packed with gzip and otherwise unchanged. 70,000
handwritten digits, 28×28 grey, by Y. LeCun, C. Cortes and C. J. C. Burges; see NOTICE for the licence.
`scripts/build_mnist.py` rebuilds the files.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import DataError
from ..text import one_line
from .archives import read_cifar10, read_emnist_letters
from .dataset import Dataset
from .download import Progress, RemoteFile, fetch
from .folder import Reading, is_picture_folder, read_picture_folder
from .idx import is_idx_folder, read_idx_folder
from .npz import read_npz
from .parquet import is_parquet, parquet_in, read_parquet
from .picture import Style
from .preparation import Preparation
from .stream import itself
from .table import is_table, read_tables, tables_in

MNIST_FOLDER = Path(__file__).with_name("mnist")

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
KMNIST_CLASSES = tuple("おきすつなはまやれを")


@dataclass(frozen=True)
class Known:
    """A data set that has a name."""

    about: str  # one line for a list
    style: Style  # how a picture is prepared for a network that learned it, see `load_picture`
    files: tuple[RemoteFile, ...]  # what is fetched; nothing for a data set inside the package
    read: Callable[[Path], Dataset]  # from the folder with the files


def _everywhere(name: str, size: int, sha256: str, *places: str) -> RemoteFile:
    """A file at each of ``places``, and in the Internet Archive's copy of the first."""
    urls = [f"{place}/{name}" for place in places]
    return RemoteFile(name, size, sha256, (*urls, f"https://web.archive.org/web/2id_/{urls[0]}"))


_FASHION = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets",
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion",
)
_KMNIST = (
    "http://codh.rois.ac.jp/kmnist/dataset/kmnist",
    "https://codh.rois.ac.jp/kmnist/dataset/kmnist",
)
_EMNIST = (
    "https://biometrics.nist.gov/cs_links/EMNIST",
    "https://www.itl.nist.gov/iaui/vip/cs_links/EMNIST",
)
_CIFAR = ("https://www.cs.toronto.edu/~kriz", "https://cave.cs.toronto.edu/kriz")

# Sizes and SHA-256 sums as TensorFlow Datasets publishes them (url_checksums). Those of Fashion-MNIST were
# also recomputed from real files; docs/design/data.md says how, and what could not be.
FASHION_FILES = (
    _everywhere("train-images-idx3-ubyte.gz", 26421880,
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84", *_FASHION),
    _everywhere("train-labels-idx1-ubyte.gz", 29515,
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845", *_FASHION),
    _everywhere("t10k-images-idx3-ubyte.gz", 4422102,
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073", *_FASHION),
    _everywhere("t10k-labels-idx1-ubyte.gz", 5148,
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5", *_FASHION),
)  # fmt: skip
KMNIST_FILES = (
    _everywhere("train-images-idx3-ubyte.gz", 18165135,
                "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4", *_KMNIST),
    _everywhere("train-labels-idx1-ubyte.gz", 29497,
                "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17", *_KMNIST),
    _everywhere("t10k-images-idx3-ubyte.gz", 3041136,
                "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5", *_KMNIST),
    _everywhere("t10k-labels-idx1-ubyte.gz", 5120,
                "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c", *_KMNIST),
)  # fmt: skip
EMNIST_FILES = (
    _everywhere("gzip.zip", 561753746,
                "fb9bb67e33772a9cc0b895e4ecf36d2cf35be8b709693c3564cea2a019fcda8e", *_EMNIST),
)  # fmt: skip
CIFAR_FILES = (
    _everywhere("cifar-10-binary.tar.gz", 170052171,
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd", *_CIFAR),
)  # fmt: skip


def _named(folder: Path, name: str, classes: tuple[str, ...]) -> Dataset:
    return read_idx_folder(folder, name, classes)


KNOWN = {
    "mnist": Known(
        "handwritten digits, 60,000 + 10,000, grey 28×28, 10 classes; inside the package",
        "digit", (), lambda folder: read_idx_folder(folder, "mnist"),
    ),
    "fashion-mnist": Known(
        "clothing, 60,000 + 10,000, grey 28×28, 10 classes; 31 MB to download",
        "object", FASHION_FILES, lambda folder: _named(folder, "fashion-mnist", FASHION_CLASSES),
    ),
    "kmnist": Known(
        "cursive Japanese characters, 60,000 + 10,000, grey 28×28, 10 classes; 21 MB to download",
        "object", KMNIST_FILES, lambda folder: _named(folder, "kmnist", KMNIST_CLASSES),
    ),
    "emnist-letters": Known(
        "handwritten letters, small and capital together, grey 28×28, 26 classes; 562 MB to download",
        "digit", EMNIST_FILES, lambda folder: read_emnist_letters(folder / "gzip.zip"),
    ),
    "cifar10": Known(
        "small photographs, 50,000 + 10,000, colour 32×32, 10 classes; 170 MB to download",
        "plain", CIFAR_FILES, lambda folder: read_cifar10(folder / "cifar-10-binary.tar.gz"),
    ),
}  # fmt: skip


def known_names() -> dict[str, str]:
    """Each name that `load` knows, with one line about it."""
    return {name: known.about for name, known in KNOWN.items()}


def picture_style(name: str, channels: int) -> Style:
    """How a picture is prepared for a network that learned data set ``name``, see `load_picture`.

    A data set that has no name here (somebody's own) gets its pictures resized and nothing else.
    """
    known = KNOWN.get(name)
    return known.style if known is not None and channels == 1 else "plain"


def load(
    name_or_path: str | os.PathLike[str],
    *,
    size: tuple[int, int] | None = None,
    preparation: Preparation | None = None,
    skip_damaged: bool = False,
    progress: Progress | None = None,
) -> Dataset:
    """Load a data set by name, or read it from a file or folder.

    Args:
        name_or_path: a name from `known_names`; or a folder of IDX files, an NPZ, CSV or Parquet file, a
            folder with CSV or Parquet files for training and testing, or a folder of pictures with one
            subfolder per class. A name wins over a path of the same spelling; write ``./mnist`` for the
            folder.
        size: (H, W) to which pictures in files are resized; the other formats state their own.
        preparation: how pictures in files are read, as a run keeps it; ``size`` is then its own. By
            default it is learned from the pictures, and is the data set's ``preparation``.
        skip_damaged: pass over pictures that cannot be read; the data set's ``notes`` name each.
        progress: called during a download with the file's name, the bytes here, and the bytes in all.

    Returns:
        The data set, whole, in memory.

    Raises:
        DataError: there is no such name or path, what is there is damaged or in no known format, or a
            download failed (the message says what to fetch by hand, and where to put it).
    """
    size = preparation.size if preparation is not None else size
    if isinstance(name_or_path, str) and name_or_path in KNOWN:
        known = KNOWN[name_or_path]
        files = known.files
        found = known.read(fetch(files, name_or_path, progress=progress) if files else MNIST_FOLDER)
        channels, height, width = found.image_shape
        style = picture_style(name_or_path, channels)
        found = replace(found, preparation=Preparation(channels, height, width, style))
    else:
        try:
            found = _load_path(Path(name_or_path), Reading(size, skip_damaged, preparation))
        except DataError as error:
            # What is wrong with arrays that do not fit together was noticed where no path is known.
            where = one_line(name_or_path)
            raise error if where.rstrip(os.sep) in str(error) else DataError(f"{where}: {error}") from None
    if size is not None and found.image_shape[1:] != tuple(size):
        _, height, width = found.image_shape
        raise DataError(
            f"{name_or_path}: its images are {height}×{width}; only pictures in folders are resized"
        )
    return found


def _load_path(path: Path, how: Reading) -> Dataset:
    if not os.path.exists(path):  # noqa: PTH110 -- Path.exists raises where a name is too long
        raise DataError(f"{str(path)!r}: no such data set or path; names are {', '.join(KNOWN)}")
    path = itself(path)
    name = path.resolve().stem if path.is_file() else path.resolve().name
    if path.is_dir():
        if is_idx_folder(path):
            return read_idx_folder(path, name)
        if tables := tables_in(path):
            return read_tables(tables, path, name)
        if tables := parquet_in(path):
            return read_parquet(tables, path, name, how)
        if is_picture_folder(path):
            return read_picture_folder(path, name, how)
    elif path.suffix.lower() == ".npz":
        return read_npz(path, name)
    elif is_table(path):
        return read_tables([path], path, name.partition(".")[0])
    elif is_parquet(path):
        return read_parquet([path], path, name, how)
    raise DataError(
        f"{path}: no data set found here; give a folder of IDX files, an NPZ, CSV or Parquet file, or a "
        "folder of pictures with one subfolder per class"
    )
