"""A folder of pictures, one subfolder per class."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import DataError
from ..memory import lacking
from .classes import match
from .dataset import MAX_SIDE, Dataset, Split, arrange
from .decode import SUFFIXES, Encoded, full_scale, highest_sample, is_deep, is_grey, open_picture
from .parts import part_of_folder
from .preparation import Preparation
from .stream import MAX_BYTES, listing

_LITTER = {"thumbs.db", "desktop.ini"}
_KEPT = 96  # pixels up to which the sides of pictures that are all alike are left as they are …
_SIDES = (32, 64)  # … else the least and the greatest side that is decided on
_NAMED = 50  # damaged pictures that one message names


Fit = Literal["crop", "stretch"]
_CROP: Fit = "crop"


class Entry(NamedTuple):
    """A picture and its class."""

    source: Path | Encoded
    label: int


_Place = tuple[Path | Encoded, npt.NDArray[np.uint8]]  # a picture, and where its pixels go


class Reading(NamedTuple):
    """How pictures are to be read: to which (H, W), whether damaged ones are passed over, and how prepared.

    A ``preparation`` is that of an earlier training; None: it is learned from the pictures.
    """

    size: tuple[int, int] | None = None
    skip_damaged: bool = False
    preparation: Preparation | None = None


class Pictures(NamedTuple):
    """What was read: the pictures that could be, as splits; what is to be told; how they were prepared."""

    kept: dict[str, list[Entry]]
    splits: dict[str, Split]
    notes: list[str]
    preparation: Preparation

    def arranged(self, name: str, classes: Sequence[str], keys: Sequence[str], where: str) -> Dataset:
        """The data set that they are."""
        dataset = arrange(name, self.splits, classes, keys, where, self.notes)
        return replace(dataset, preparation=self.preparation)


def read_picture_folder(folder: Path, name: str, how: Reading) -> Dataset:
    """Read a folder of pictures with one subfolder per class.

    ``folder`` holds either the class folders, of whose pictures a fifth is held out for testing (see
    `hold_out`), or a folder ``train`` and a folder ``test`` or ``val`` or both, each with the same class
    folders; folders of these names that hold pictures themselves are classes. Classes are numbered in the
    order of their names. Images are grey (C = 1) if every picture is, else colour (C = 3). Hidden files are
    passed over; any other file that is no picture is an error, because a picture left out in silence is
    worse.

    A picture of another shape than ``how.size`` (H, W) is cropped about its centre to these proportions, then
    resized (Lanczos, with anti-aliasing). Without a size, small pictures of one size are kept as they are;
    else the size is decided from the pictures', to which they are stretched, and a note says so. Samples of
    more than eight bits are scaled alike in all pictures. What is learned of the pictures is the data set's
    ``preparation``; if ``how`` has one, they are read by it instead, as a network of an earlier training saw
    its own.

    Raises:
        DataError: no class folders, a class without pictures to train on, files that are no pictures or are
            damaged (all are named), classes in ``test`` that ``train`` lacks, or
            more pixels than fit in memory.
    """
    roots = _roots(folder)
    classes = _classes(roots["train"])
    parts, notes = {}, []
    for part, root in roots.items():
        parts[part], told = _entries(root, classes, roots["train"])
        notes += told
    read = read_pictures(parts, str(folder), classes, how)
    keys = [Path(str(source)).relative_to(folder).as_posix() for source, _ in read.kept["train"]]
    return read._replace(notes=notes + read.notes).arranged(name, classes, keys, str(folder))


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
) -> Pictures:
    """Decode the pictures of each part, all to one shape, and prepare them alike.

    All damaged pictures are told of at once: in a `DataError`, or in the notes if they are passed over.
    """
    damaged: dict[Path | Encoded, str] = {}
    everything = [*chain(*parts.values())]
    settled, notes = how.preparation, list[str]()
    if settled is None:
        settled, notes = _settle(where, everything, how.size, damaged)
    _check_room(where, len(everything), settled)
    shape = (settled.channels, *settled.size)
    images = {part: np.empty((len(entries), *shape), np.uint8) for part, entries in parts.items()}
    places = [*zip((entry.source for entry in everything), chain(*images.values()), strict=True)]
    if how.preparation is None:
        uncut = _resize(places, settled, damaged)
        if any(fine := _fine(parts["train"], damaged)):
            settled = settled.learned(images["train"] if all(fine) else images["train"][fine])
        if settled.style != "plain":  # ink is placed: nothing of it is cut off
            settled = replace(settled, fit="crop")
        places = [] if settled.style == "plain" else [
            (source, image) for source, image in places
            if source not in damaged and not (source in uncut and settled.obeyed_by(image))
        ]  # fmt: skip
    for source, image in places:
        with _collected(source, damaged):
            _check_name(source)
            image[:] = settled.prepare(source, blank=True)
    kept = {part: [entry for entry in own if entry.source not in damaged] for part, own in parts.items()}
    messages = [damaged[entry.source] for entry in everything if entry.source in damaged]
    if damaged and not how.skip_damaged:
        raise DataError(_damaged(where, messages))
    _check_left(where, parts, kept, classes)
    splits = {}
    for part, entries in kept.items():
        fine = _fine(parts[part], damaged)
        labels = np.array([label for _, label in entries], np.int64)
        names = [str(source) for source, _ in entries]
        splits[part] = Split(images[part] if all(fine) else images[part][fine], labels, names)
    notes += [f"passed over: {message}" for message in messages]
    return Pictures(kept, splits, notes, settled)


@contextmanager
def _collected(source: Path | Encoded, damaged: dict[Path | Encoded, str]) -> Iterator[None]:
    """Note what is wrong with a picture, and go on with the next."""
    try:
        yield
    except DataError as error:
        damaged[source] = str(error)


def _check_name(source: Path | Encoded) -> None:
    if isinstance(source, Path) and source.suffix.lower() not in SUFFIXES:
        raise DataError(f"{source}: not a picture; remove it, or save it as PNG or JPEG")


def _fine(entries: Sequence[Entry], damaged: Container[Path | Encoded]) -> list[bool]:
    return [entry.source not in damaged for entry in entries]


def _resize(
    places: Iterable[_Place], plain: Preparation, damaged: dict[Path | Encoded, str]
) -> set[Path | Encoded]:
    """Resize pictures into their places; return those of which nothing was cut off."""
    uncut = set()
    for source, image in places:
        if source in damaged:
            continue
        with _collected(source, damaged):
            image[:], whole = plain.resized(source)
            if whole:
                uncut.add(source)
    return uncut


def _check_left(
    where: str,
    parts: Mapping[str, Sequence[Entry]],
    kept: Mapping[str, Sequence[Entry]],
    classes: Sequence[str],
) -> None:
    """`DataError` if too much is damaged: a whole part, or a class of the training pictures."""
    for part, entries in kept.items():
        if not entries:
            raise DataError(f"{where}: no picture to {part} with could be read")
    for label in {label for _, label in parts["train"]} - {label for _, label in kept["train"]}:
        raise DataError(f"{where}: no picture of class {classes[label]!r} could be read")


def _damaged(where: str, messages: list[str]) -> str:
    if len(messages) == 1:
        return f"{messages[0]} (--skip-damaged passes over it)"
    short = [message.rpartition(";")[0] or message for message in messages]  # without what to do
    more = f"; … and {len(messages) - _NAMED} more" if len(messages) > _NAMED else ""
    return (
        f"{where}: {len(messages)} pictures cannot be read (--skip-damaged passes over them): "
        f"{'; '.join(short[:_NAMED])}{more}"
    )


def _settle(
    where: str, entries: list[Entry], size: tuple[int, int] | None, damaged: dict[Path | Encoded, str]
) -> tuple[Preparation, list[str]]:
    """Channels, size and full scale, from the headers; only pictures of more than eight bits are decoded.

    Without a size it is decided from the pictures', which is told in the second value.
    """
    grey, sizes = True, []
    deep: list[tuple[Path | Encoded, bool]] = []
    for source, _ in entries:
        with _collected(source, damaged):
            _check_name(source)
            with open_picture(source) as picture:
                colourless, floating = is_grey(picture), picture.mode == "F"
                width, height = _upright(picture)
                if is_deep(picture):
                    deep.append((source, floating))
        if source in damaged:
            continue
        grey = grey and colourless
        sizes.append((height, width))
    if not sizes:
        raise DataError(_damaged(where, list(damaged.values())) if damaged else f"{where}: no pictures")
    (height, width), fit, notes = _decided(np.array(sizes)) if size is None else (size, _CROP, [])
    if not 1 <= min(height, width) <= max(height, width) <= MAX_SIDE:
        raise DataError(
            f"{where}: images of {height}×{width}; state a size between 1 and {MAX_SIDE} (--image-size)"
        )
    settled = Preparation(1 if grey else 3, height, width, fit=fit)
    scales = []
    for source, floating in deep:
        with _collected(source, damaged):
            scales.append(full_scale(highest_sample(source), floating=floating))
    return replace(settled, full=max(scales, default=None)), notes


def _decided(sizes: npt.NDArray[np.int64]) -> tuple[tuple[int, int], Fit, list[str]]:
    """The size that pictures (N, 2: height, width) are brought to, how they fit it, and what is to be told.

    Small pictures of one size stay as they are. Else it is the median height and width, reduced together
    until the longer is at most 64, each at least 32 and a multiple of 8. Pictures of several proportions are
    stretched: what they show may be anywhere, and cropping would lose it.
    """
    least, most = sizes.min(0), sizes.max(0)
    if (least == most).all() and most.max() <= _KEPT:
        return (int(most[0]), int(most[1])), "crop", []
    middle = np.median(sizes, 0)
    scaled = middle * min(1.0, _SIDES[1] / middle.max())
    height, width = (int(side) for side in np.clip(8 * np.rint(scaled / 8), *_SIDES))
    across, down = sizes[:, 1] * height, sizes[:, 0] * width
    fit: Fit = "crop"
    if (np.abs(across - down) > 0.02 * np.maximum(across, down)).any():
        fit = "stretch"
    seen = f"{least[0]}×{least[1]}" + ("" if (least == most).all() else f" to {most[0]}×{most[1]}")
    told = (
        f"pictures of {seen} are resized to {height}×{width}; --image-size HxW takes another size (twice the "
        "height and width take four times as long)"
    )
    return (height, width), fit, [told]


def _check_room(where: str, count: int, preparation: Preparation) -> None:
    """Refuse more pictures than can be held, before any is decoded."""
    height, width = preparation.size
    need = count * preparation.channels * height * width
    lack = lacking(need)
    if need > MAX_BYTES or lack:
        raise DataError(
            f"{where}: {count} images of {height}×{width} do not fit ({lack or 'more than 4 GB'}); "
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
