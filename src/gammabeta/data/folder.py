"""A folder of pictures, one subfolder per class."""

from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import DataError
from ..memory import lacking
from .dataset import MAX_SIDE, Dataset, Split, hold_out
from .decode import SUFFIXES, is_deep, is_grey, open_picture
from .preparation import Preparation, deep_scale
from .stream import MAX_BYTES, listing

_LITTER = {"thumbs.db", "desktop.ini"}
_TEST = ("test", "val", "valid", "validation")


_Entry = tuple[Path, int]  # a picture and its class


def read_picture_folder(
    folder: Path,
    name: str,
    *,
    size: tuple[int, int] | None = None,
    preparation: Preparation | None = None,
) -> Dataset:
    """Read a folder of pictures with one subfolder per class.

    ``folder`` holds either the class folders, of whose pictures a fifth is held out for testing (see
    `hold_out`), or a folder ``train`` and a folder ``test`` (or ``val``), each with the same class folders.
    Classes are numbered in the order of their names. Images are grey (C = 1) if every picture is, else
    colour (C = 3). Hidden files are passed over; any other file that is no picture is an error, because a
    picture left out in silence is worse.

    A picture of another shape than ``size`` (H, W) is cropped about its centre to these proportions, then
    resized (Lanczos, with anti-aliasing). Without ``size`` all must be of one size, which is kept. Samples
    of more
    than eight bits are scaled alike in all pictures. What is learned of the pictures is the data set's
    ``preparation``; if one is given, they are read by it instead, as a network of an earlier training saw
    its own.

    Raises:
        DataError: no class folders, an empty class, a file that is no picture or is damaged, pictures of
            different sizes, classes in ``test`` that ``train`` lacks, or more pixels than fit in memory.
    """
    roots = _roots(folder)
    classes = _classes(roots[0])
    for root in roots[1:]:
        strange = [found for found in _classes(root) if found not in classes]
        if strange:
            raise DataError(f"{root}: class {strange[0]!r} is not in {roots[0]}; both need the same classes")
    parts = [_entries(root, classes) for root in roots]
    if preparation is None:
        settled = _settle(folder, list(chain(*parts)), size)
        settled, splits = _learn(parts, settled)
    else:
        settled = preparation
        _check_room(folder, sum(map(len, parts)), settled)
        splits = [_read(entries, settled) for entries in parts]
    if len(splits) == 1:
        keys = [path.relative_to(folder).as_posix() for path, _ in parts[0]]
        splits = [*hold_out(splits[0], keys, str(folder))]
    return Dataset(name, splits[0], splits[1], tuple(classes), settled)


def _roots(folder: Path) -> list[Path]:
    """The folders that hold class folders: one for training and one for testing, or one for both."""
    if not (folder / "train").is_dir():
        return [folder]
    for part in _TEST:
        if (folder / part).is_dir():
            return [folder / "train", folder / part]
    raise DataError(f"{folder}: has a folder train but no folder test; add one with the same classes")


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
            entries.append((path, label))
    return entries


def _settle(folder: Path, entries: list[_Entry], size: tuple[int, int] | None) -> Preparation:
    """Channels, size and full scale, from the headers; only pictures of more than eight bits are decoded."""
    grey, first = True, None  # first: the first picture's path and (height, width)
    deep: list[tuple[Path, bool]] = []
    for path, _ in entries:
        with open_picture(path) as picture:
            grey = grey and is_grey(picture)
            width, height = _upright(picture)
            if is_deep(picture):
                deep.append((path, picture.mode == "F"))
        if size is None and first is not None and first[1] != (height, width):
            raise DataError(
                f"{path}: {height}×{width} pixels, but {first[0]} has {first[1][0]}×{first[1][1]}; "
                "state the size (height, width) that all are to be resized to (--image-size)"
            )
        first = first or (path, (height, width))
    if first is None:
        raise DataError(f"{folder}: no pictures")
    height, width = size or first[1]
    if not 1 <= min(height, width) <= max(height, width) <= MAX_SIDE:
        raise DataError(
            f"{folder}: images of {height}×{width}; state a size between 1 and {MAX_SIDE} (--image-size)"
        )
    settled = Preparation(1 if grey else 3, height, width)
    _check_room(folder, len(entries), settled)
    return replace(settled, full=deep_scale(deep))


def _check_room(folder: Path, count: int, preparation: Preparation) -> None:
    """Refuse more pictures than can be held, before any is decoded."""
    height, width = preparation.size
    need = count * preparation.channels * height * width
    lack = lacking(need)
    if need > MAX_BYTES or lack:
        raise DataError(
            f"{folder}: {count} images of {height}×{width} do not fit ({lack or 'more than 4 GB'}); "
            "state a smaller size (--image-size)"
        )


def _upright(picture: Image.Image) -> tuple[int, int]:
    """(width, height) after EXIF's orientation is obeyed: 5 to 8 lie on their side."""
    try:
        turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception:  # damaged EXIF: the decoder says so, if it minds
        turned = False
    width, height = picture.size
    return (height, width) if turned else (width, height)


def _read(entries: list[_Entry], preparation: Preparation) -> Split:
    images = np.empty((len(entries), preparation.channels, *preparation.size), np.uint8)
    for image, (path, _) in zip(images, entries, strict=True):
        image[:] = preparation.prepare(path, blank=True)
    return Split(images, np.array([label for _, label in entries], np.int64))


def _learn(parts: list[list[_Entry]], plain: Preparation) -> tuple[Preparation, list[Split]]:
    """Read pictures, learn their style, and prepare those without it as a prediction would."""
    splits, whole = [], []
    for entries in parts:
        split = Split(
            np.empty((len(entries), plain.channels, *plain.size), np.uint8),
            np.array([label for _, label in entries], np.int64),
        )
        for image, (path, _) in zip(split.images, entries, strict=True):
            image[:], all_of_it = plain.resized(path)
            whole.append(all_of_it)
        splits.append(split)
    settled = plain.learned(splits[0].images)
    if settled.style != "plain":
        images = chain(*(split.images for split in splits))
        for image, (path, _), all_of_it in zip(images, chain(*parts), whole, strict=True):
            if not (all_of_it and settled.obeyed_by(image)):
                image[:] = settled.prepare(path, blank=True)
    return settled, splits
