"""A folder of pictures, one subfolder per class."""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from ..errors import DataError
from .classes import match
from .dataset import MAX_SIDE, Dataset, Split, arrange
from .decode import SUFFIXES, Encoded, decode, is_grey, open_picture, planes
from .parts import part_of_folder
from .stream import MAX_BYTES, listing

_LITTER = {"thumbs.db", "desktop.ini"}
_NAMED = 50  # damaged pictures that one message names


class Entry(NamedTuple):
    """A picture and its class."""

    source: Path | Encoded
    label: int


class Reading(NamedTuple):
    """How pictures are to be read: to which (H, W), and whether damaged ones are passed over."""

    size: tuple[int, int] | None = None
    skip_damaged: bool = False


def read_picture_folder(folder: Path, name: str, how: Reading) -> Dataset:
    """Read a folder of pictures with one subfolder per class.

    ``folder`` holds either the class folders, of whose pictures a fifth is held out for testing (see
    `hold_out`), or a folder ``train`` and a folder ``test`` or ``val`` or both, each with the same class
    folders; folders of these names that hold pictures themselves are classes. Classes are numbered in the
    order of their names. Images are grey (C = 1) if every picture is, else colour (C = 3). Hidden files are
    passed over; any other file that is no picture is an error, because a picture left out in silence is
    worse.

    A picture of another shape than ``how.size`` (H, W) is cropped about its centre to these proportions, then
    resized (Lanczos, with anti-aliasing). Without a size all must be of one size, which is kept.

    Raises:
        DataError: no class folders, a class without pictures to train on, files that are no pictures or are
            damaged (all are named), pictures of different sizes, classes in ``test`` that ``train`` lacks, or
            more pixels than fit in memory.
    """
    roots = _roots(folder)
    classes = _classes(roots["train"])
    parts, notes = {}, []
    for part, root in roots.items():
        parts[part], told = _entries(root, classes, roots["train"])
        notes += told
    kept, splits, told = read_pictures(parts, str(folder), classes, how)
    keys = [Path(str(source)).relative_to(folder).as_posix() for source, _ in kept["train"]]
    return arrange(name, splits, classes, keys, str(folder), (*notes, *told))


def _roots(folder: Path) -> dict[str, Path]:
    """The folders that hold class folders, by what they are for; a single one for everything is ``train``."""
    found: dict[str, Path] = {}
    for entry in _listed(folder):
        part = part_of_folder(entry.name) if entry.is_dir() else None
        if part is None or not is_picture_folder(entry):
            continue  # a class may be called "train", too: it holds pictures, and no folders
        if part in found:
            raise DataError(f"{folder}: {found[part].name} and {entry.name} are both for {part}; keep one")
        found[part] = entry
    if "train" not in found:
        return {"train": folder}
    if len(found) == 1:
        raise DataError(
            f"{folder}: has a folder {found['train'].name} but no folder test; add one with the same classes"
        )
    return found


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


def _entries(root: Path, classes: list[str], train: Path) -> tuple[list[Entry], list[str]]:
    """The pictures below ``root`` with their classes; only the folder ``train`` must have every class."""
    names = classes if root == train else [name for name in _classes(root) if _listed(root / name)]
    labels, matched = match(names, classes, (str(root), str(train)))
    entries = []
    for label, name in zip(labels, names, strict=True):
        found = _listed(root / name)
        if not found:
            raise DataError(f"{root / name}: no pictures; add some, or remove the class")
        for path in found:
            if path.is_dir():
                raise DataError(
                    f"{path}: a folder inside a class; put its pictures into the class's own folder"
                )
            entries.append(Entry(path, label))
    return entries, [f"{root}: {note}" for note in matched]


def read_pictures(
    parts: Mapping[str, Sequence[Entry]], where: str, classes: Sequence[str], how: Reading
) -> tuple[dict[str, list[Entry]], dict[str, Split], list[str]]:
    """Decode the pictures of each part, all to one shape: those that could be read, their splits, and notes.

    All damaged pictures are told of at once: in a `DataError`, or in the notes if they are passed over.
    """
    damaged: dict[Path | Encoded, str] = {}
    shape = _shape(where, [*chain(*parts.values())], how.size, damaged)
    splits, kept = {}, {}
    for part, entries in parts.items():
        images = np.empty((len(entries), *shape), np.uint8)
        whole = [_read(entry.source, image, damaged) for entry, image in zip(entries, images, strict=True)]
        kept[part] = [entry for entry, fine in zip(entries, whole, strict=True) if fine]
        labels = np.array([label for _, label in kept[part]], np.int64)
        splits[part] = Split(images if all(whole) else images[whole], labels) if kept[part] else None
    messages = [damaged[entry.source] for entry in chain(*parts.values()) if entry.source in damaged]
    if damaged and not how.skip_damaged:
        raise DataError(_damaged(where, messages))
    for part, split in splits.items():
        if split is None:
            raise DataError(f"{where}: no picture to {part} with could be read")
    left = {label for _, label in kept.get("train", ())}
    for label in {label for _, label in parts.get("train", ())} - left:
        raise DataError(f"{where}: no picture of class {classes[label]!r} could be read")
    notes = [f"passed over: {message}" for message in messages]
    return kept, {part: split for part, split in splits.items() if split is not None}, notes


def _damaged(where: str, messages: list[str]) -> str:
    if len(messages) == 1:
        return f"{messages[0]} (--skip-damaged passes over it)"
    short = [message.rpartition(";")[0] or message for message in messages]  # without what to do
    more = f"; … and {len(messages) - _NAMED} more" if len(messages) > _NAMED else ""
    return (
        f"{where}: {len(messages)} pictures cannot be read (--skip-damaged passes over them): "
        f"{'; '.join(short[:_NAMED])}{more}"
    )


def _shape(
    where: str, entries: list[Entry], size: tuple[int, int] | None, damaged: dict[Path | Encoded, str]
) -> tuple[int, int, int]:
    """(C, H, W), from the headers alone."""
    grey, first = True, None  # first: the first picture's path and (height, width)
    for source, _ in entries:
        try:
            if isinstance(source, Path) and source.suffix.lower() not in SUFFIXES:
                raise DataError(f"{source}: not a picture; remove it, or save it as PNG or JPEG")
            with open_picture(source) as picture:
                grey = grey and is_grey(picture)
                width, height = _upright(picture)
        except DataError as error:
            damaged[source] = str(error)
            continue
        if size is None and first is not None and first[1] != (height, width):
            raise DataError(
                f"{source}: {height}×{width} pixels, but {first[0]} has {first[1][0]}×{first[1][1]}; "
                "state the size (height, width) that all are to be resized to: --image-size HxW"
            )
        first = first or (source, (height, width))
    if first is None:
        raise DataError(_damaged(where, list(damaged.values())) if damaged else f"{where}: no pictures")
    height, width = size or first[1]
    shape = (1 if grey else 3, height, width)
    if not 1 <= min(height, width) <= max(height, width) <= MAX_SIDE:
        raise DataError(f"{where}: images of {height}×{width}; state a size between 1 and {MAX_SIDE}")
    if len(entries) * shape[0] * height * width > MAX_BYTES:
        raise DataError(
            f"{where}: {len(entries)} images of {height}×{width} do not fit; state a smaller size"
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


def _read(source: Path | Encoded, image: npt.NDArray[np.uint8], damaged: dict[Path | Encoded, str]) -> bool:
    """Decode a picture into its place; if it is damaged say so and return False."""
    if source in damaged:
        return False
    channels, height, width = image.shape
    try:
        picture = decode(source, "L" if channels == 1 else "RGB", at_least=2 * max(height, width))
    except DataError as error:
        damaged[source] = str(error)
        return False
    if picture.size != (width, height):
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    image[:] = planes(picture)
    return True
