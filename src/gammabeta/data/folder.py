"""A folder of pictures, one subfolder per class."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from ..errors import DataError
from .dataset import MAX_SIDE, Dataset, Split, hold_out
from .decode import SUFFIXES, decode, is_grey, open_picture
from .stream import MAX_BYTES, listing

_LITTER = {"thumbs.db", "desktop.ini"}
_TEST = ("test", "val", "valid", "validation")


@dataclass(frozen=True)
class _Entry:
    path: Path
    label: int


def read_picture_folder(folder: Path, name: str, *, size: tuple[int, int] | None = None) -> Dataset:
    """Read a folder of pictures with one subfolder per class.

    ``folder`` holds either the class folders, of whose pictures a fifth is held out for testing (see
    `hold_out`), or a folder ``train`` and a folder ``test`` (or ``val``), each with the same class folders.
    Classes are numbered in the order of their names. Images are grey (C = 1) if every picture is, else
    colour (C = 3). Hidden files are passed over; any other file that is no picture is an error, because a
    picture left out in silence is worse.

    Args:
        folder: where the pictures are.
        name: what to call the data set.
        size: (H, W) of the images. A picture of another shape is cropped about its centre to these
            proportions, then resized (Lanczos, with anti-aliasing). Without ``size`` all pictures must be
            of one size, which is kept.

    Raises:
        DataError: no class folders, an empty class, a file that is no picture or is damaged, pictures of
            different sizes, classes in ``test`` that ``train`` lacks, or more pixels than fit in memory.
    """
    train_root = folder / "train"
    if not train_root.is_dir():
        classes = _classes(folder)
        entries = _entries(folder, classes)
        whole = _read(folder, entries, _shape(folder, entries, size))
        keys = [entry.path.relative_to(folder).as_posix() for entry in entries]
        train, test = hold_out(whole, keys, str(folder))
        return Dataset(name, train, test, tuple(classes))
    test_root = next((folder / part for part in _TEST if (folder / part).is_dir()), None)
    if test_root is None:
        raise DataError(f"{folder}: has a folder train but no folder test; add one with the same classes")
    classes = _classes(train_root)
    strange = [found for found in _classes(test_root) if found not in classes]
    if strange:
        raise DataError(
            f"{test_root}: class {strange[0]!r} is not in {train_root}; both need the same classes"
        )
    train_entries, test_entries = _entries(train_root, classes), _entries(test_root, classes)
    shape = _shape(folder, train_entries + test_entries, size)
    train, test = (_read(folder, entries, shape) for entries in (train_entries, test_entries))
    return Dataset(name, train, test, tuple(classes))


def is_picture_folder(folder: Path) -> bool:
    """Whether ``folder`` has subfolders, which might be classes."""
    return any(entry.is_dir() and not entry.name.startswith(".") for entry in listing(folder))


def _listed(folder: Path) -> list[Path]:
    """What is in ``folder``, hidden files and the systems' own left out."""
    return [
        entry
        for entry in listing(folder)
        if not entry.name.startswith(".") and entry.name.lower() not in _LITTER
    ]


def _classes(root: Path) -> list[str]:
    entries = _listed(root)
    loose = [entry for entry in entries if not entry.is_dir()]
    if loose:
        raise DataError(f"{loose[0]}: a file beside the class folders; put it into the folder of its class")
    if not entries:
        raise DataError(f"{root}: no class folders; make one folder per class and put its pictures there")
    return [entry.name for entry in entries]


def _entries(root: Path, classes: list[str]) -> list[_Entry]:
    entries = []
    for label, name in enumerate(classes):
        found = _listed(root / name) if (root / name).is_dir() else []
        if not found:
            raise DataError(f"{root / name}: no pictures; add some, or remove the class")
        for path in found:
            if path.suffix.lower() not in SUFFIXES or path.is_dir():
                raise DataError(f"{path}: not a picture; remove it, or save it as PNG or JPEG")
            entries.append(_Entry(path, label))
    return entries


def _shape(folder: Path, entries: list[_Entry], size: tuple[int, int] | None) -> tuple[int, int, int]:
    """(C, H, W), from the headers alone."""
    grey, first = True, None  # first: the first picture's path and (height, width)
    for entry in entries:
        with open_picture(entry.path) as picture:
            grey = grey and is_grey(picture)
            width, height = _upright(picture)
        if size is None and first is not None and first[1] != (height, width):
            raise DataError(
                f"{entry.path}: {height}×{width} pixels, but {first[0]} has {first[1][0]}×{first[1][1]}; "
                "state the size (height, width) that all are to be resized to"
            )
        first = first or (entry.path, (height, width))
    if first is None:
        raise DataError(f"{folder}: no pictures")
    height, width = size or first[1]
    shape = (1 if grey else 3, height, width)
    if not 1 <= min(height, width) <= max(height, width) <= MAX_SIDE:
        raise DataError(f"{folder}: images of {height}×{width}; state a size between 1 and {MAX_SIDE}")
    if len(entries) * shape[0] * height * width > MAX_BYTES:
        raise DataError(
            f"{folder}: {len(entries)} images of {height}×{width} do not fit; state a smaller size"
        )
    return shape


def _upright(picture: Image.Image) -> tuple[int, int]:
    """(width, height) after EXIF's orientation is obeyed: 5 to 8 lie on their side."""
    try:
        turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception:  # damaged EXIF: the decoder says so, if it minds
        turned = False
    width, height = picture.size
    return (height, width) if turned else (width, height)


def _read(folder: Path, entries: list[_Entry], shape: tuple[int, int, int]) -> Split:
    channels, height, width = shape
    images = np.empty((len(entries), *shape), np.uint8)
    for image, entry in zip(images, entries, strict=True):
        image[:] = _one(entry.path, channels, (width, height))
    return Split(images, np.array([entry.label for entry in entries], np.int64))


def _one(path: Path, channels: int, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    picture = decode(path, "L" if channels == 1 else "RGB", at_least=2 * max(size))
    if picture.size != size:
        picture = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    pixels = np.asarray(picture)
    return pixels[np.newaxis] if channels == 1 else pixels.transpose(2, 0, 1)
