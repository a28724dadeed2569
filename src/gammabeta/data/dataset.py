"""What every reader returns: images and labels, checked once, here; and images held out for testing."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..errors import DataError, UsageError
from ..text import storable
from .preparation import Preparation, flat_pictures

#: Larger images are photographs, not the input of a network that is held in memory whole.
MAX_SIDE = 4096

#: More classes than this are a damaged label, not a data set of ours.
MAX_CLASSES = 65_536

#: The share of each class that is held out for testing.
SHARE = 0.2


@dataclass(frozen=True, eq=False)
class Split:
    """Images with a label each.

    Attributes:
        images: uint8, (N, C, H, W), C-contiguous and writable, 0 dark to 255 light. N ≥ 1.
        labels: int64, (N,), the index of the image's class, from 0.
        names: the file of each image, where it has one of its own; else empty.

    Raises:
        DataError: the arrays are of another type, shape or layout, are empty, or differ in length.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    names: Sequence[str] = ()

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or images.ndim != 4 or not images.flags.c_contiguous:
            raise DataError(
                f"images: expected contiguous uint8 of shape (N, C, H, W), got {images.dtype} {images.shape}"
            )
        if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise DataError(
                f"labels: expected {len(images)} of int64, one per image, got {labels.dtype} {labels.shape}"
            )
        if len(self.names) not in (0, len(labels)):
            raise DataError(f"names: expected one per image or none, got {len(self.names)} for {len(labels)}")
        if 0 in images.shape:
            raise DataError(
                f"images: at least one image with at least one pixel is needed, got {images.shape}"
            )
        if max(images.shape[2:]) > MAX_SIDE:
            raise DataError(f"images: {_size(images)} pixels; at most {MAX_SIDE} on a side can be used")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"<Split: {len(self):,} images of {_size(self.images)}>"


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training split, a test split, and the names of the classes.

    Attributes:
        name: what to call it in a report.
        train: what a network learns from.
        test: what it is judged by; the same C, H, W as ``train``.
        classes: the name of class ``i`` at place ``i``.
        preparation: how its pictures were read, or are to be; None: the training learns it from the images.
        validation: what epochs are judged by and the best one is chosen by, where there is such a split
            beside ``test``; else None.
        notes: what the reader of the data should be told, a sentence each.

    Raises:
        DataError: the splits differ in image shape, or a label has no class.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    preparation: Preparation | None = None
    validation: Split | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        splits = self.splits()
        for part, split in splits.items():
            if split.images.shape[1:] != self.train.images.shape[1:]:
                raise DataError(
                    f"{self.name}: training images are {_size(self.train.images)}, {part} images "
                    f"{_size(split.images)}; both need the same size and number of channels"
                )
        if not 1 <= len(self.classes) <= MAX_CLASSES:
            raise DataError(
                f"{self.name}: {len(self.classes)} classes; between 1 and {MAX_CLASSES} can be used"
            )
        names = tuple(map(storable, self.classes))  # a folder's name can be bytes
        object.__setattr__(self, "classes", names)
        for part, split in splits.items():
            part = "training" if part == "train" else part
            least, most = int(split.labels.min()), int(split.labels.max())
            if least < 0 or most >= len(self.classes):
                raise DataError(
                    f"{self.name}: a {part} label is {least if least < 0 else most}, "
                    f"but labels go from 0 to {len(self.classes) - 1}; the labels are damaged"
                )

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(split):,} {part}" for part, split in self.splits().items())
        what = f"images of {_size(self.train.images)}, {len(self.classes)} classes"
        return f"<Dataset {self.name!r}: {counts} {what}>"

    def splits(self) -> dict[str, Split]:
        """``train``, ``test`` and, if there is one, ``validation``."""
        found = {"train": self.train, "test": self.test, "validation": self.validation}
        return {part: split for part, split in found.items() if split is not None}

    def split(self, part: str) -> Split:
        """One of `splits`; `UsageError` if there is none of that name."""
        splits = self.splits()
        if part not in splits:
            raise UsageError(f"unknown split {part!r}: choose {' or '.join(sorted(splits))}")
        return splits[part]

    def missing(self, part: str) -> list[str]:
        """The classes that have no image in a split."""
        counts = np.bincount(self.split(part).labels, minlength=len(self.classes))
        return [name for name, count in zip(self.classes, counts, strict=True) if not count]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        _, c, h, w = self.train.images.shape
        return c, h, w

    def settled(self) -> "Dataset":
        """The data set with a preparation, learned from the training images if its reader had none."""
        c, h, w = self.image_shape
        if self.preparation is not None or c not in (1, 3):
            return self
        return replace(self, preparation=Preparation(c, h, w).learned(self.train.images))

    def remarks(self) -> list[str]:
        """What a person should know of the pictures before training on them, a line each."""
        found = [] if self.preparation is None else [f"pictures: {self.preparation.words()}"]
        for part, split in self.splits().items():
            part = "training" if part == "train" else part
            flat = flat_pictures(split.images)
            if len(flat):
                found.append(
                    f"{len(flat):,} of {len(split):,} {part} images are one flat colour (the first: "
                    f"{self._called(split, int(flat[0]))}); are they damaged?"
                )
        return found

    def _called(self, split: Split, index: int) -> str:
        """An image's file, or its number and class."""
        return (
            split.names[index]
            if split.names
            else (f"number {index}, of class {self.classes[int(split.labels[index])]!r}")
        )


def _size(images: npt.NDArray[np.uint8]) -> str:
    _, c, h, w = images.shape
    return f"{c}×{h}×{w}"


def hold_out(whole: Split, keys: Sequence[str], classes: Sequence[str], where: str) -> tuple[Split, Split]:
    """Hold a fifth of each class out for testing, at least one image of it.

    Which ones is decided by the SHA-256 of each image's key (its path, or its number), so it depends
    neither on the machine nor on a seed, and an image keeps its side, nearly always, when others are added.

    Each image has another key. A class with one image, which cannot both teach and test, is a `DataError`
    that names the file or folder, ``where``.
    """
    digests = np.array([hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest() for key in keys])
    held = np.zeros(len(whole), bool)
    for label in np.unique(whole.labels):
        members = np.flatnonzero(whole.labels == label)
        if len(members) < 2:
            raise DataError(
                f"{where}: class {classes[label]!r} has one image; a class needs two, one to test with"
            )
        count = max(1, round(SHARE * len(members)))
        held[members[np.argsort(digests[members], kind="stable")[:count]]] = True
    return _parted(whole, held)


def arrange(
    name: str,
    parts: Mapping[str, Split],
    classes: Sequence[str],
    keys: Sequence[str],
    where: str,
    notes: Sequence[str] = (),
) -> Dataset:
    """A data set from the splits that a source has; without one to test with, a fifth is held out.

    ``keys`` name the training images, see `hold_out`. A source with ``train`` and ``validation`` only is
    tested with the latter.
    """
    train, validation, test = (parts.get(part) for part in ("train", "validation", "test"))
    if train is None:
        raise DataError(f"{where}: no training images; name the part that teaches train")
    if test is None:
        test, validation = validation, None
    if test is None:
        train, test = hold_out(train, keys, classes, where)
    return Dataset(name, train, test, tuple(classes), validation=validation, notes=tuple(notes))


def hold_out_training(dataset: Dataset, count: int, seed: int) -> Dataset:
    """The data set with ``count`` of its training images in place of the test images.

    Each class gives its share (largest remainders), and which of its images is drawn by ``seed``; a class
    keeps at least one image to learn from. `UsageError` if ``count`` does not leave that.
    """
    labels = dataset.train.labels
    sizes = np.bincount(labels, minlength=len(dataset.classes))
    room = np.maximum(sizes - 1, 0)
    if not 0 < count <= room.sum():
        raise UsageError(
            f"cannot hold out {count} of {len(labels)} training images: each class keeps one to learn "
            f"from, so hold out between 1 and {room.sum()}"
        )
    shares = count * sizes / len(labels)
    many = np.minimum(np.floor(shares).astype(np.int64), room)
    while many.sum() < count:
        many[np.argmax(np.where(many < room, shares - many, -np.inf))] += 1
    # RandomState's numbers are the same in every version of NumPy, as a Generator's need not be.
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
    held = np.zeros(len(labels), bool)
    for label in np.flatnonzero(many):
        held[random.permutation(np.flatnonzero(labels == label))[: many[label]]] = True
    train, test = _parted(dataset.train, held)
    return replace(dataset, train=train, test=test, validation=None)


def _chosen(whole: Split, part: npt.NDArray[np.bool_]) -> Split:
    names = [whole.names[at] for at in np.flatnonzero(part).tolist()] if whole.names else ()
    return Split(whole.images[part], whole.labels[part], names)


def _parted(whole: Split, held: npt.NDArray[np.bool_]) -> tuple[Split, Split]:
    train, test = (_chosen(whole, part) for part in (~held, held))
    return train, test
