"""Arrays of numbers that somebody saved, as our images and labels: whatever type, scale and shape they have.

How bright a number is can only be told from all of them, so the parts of a data set (training, test) are
looked at together and scaled alike.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from .dataset import MAX_CLASSES, Split

Array = npt.NDArray[np.generic]

#: Bits of a sample that cameras and scanners write. What goes beyond eight is brought to eight.
_DEPTHS = (8, 10, 12, 14, 16)
_CHUNK = 1024  # images that are converted at a time: bounds the memory of what floating point needs
#: A data set that reaches no brighter than this of 255 was probably meant on another scale.
_DARK = 64


def splits_of(
    arrays: Mapping[str, tuple[Array, Array]], where: str, names: Mapping[int, str] | Sequence[str] = ()
) -> tuple[dict[str, Split], tuple[str, ...], list[str]]:
    """The splits, the classes' names and what is to be told, from arrays of images and labels for each part.

    Images are (N, H, W), (N, H, W, C), (N, C, H, W) or flat, (N, H·W) or (N, H·W·C), which must be square; C
    is 1 or 3. They are whole numbers from 0 to 255, or to the maximum of 10, 12, 14 or 16 bits; or floating
    point from 0 to 1, from -1 to 1, or from 0 to 255; or true and false.

    Labels are whole numbers from 0 (of any type), texts, or one-hot rows. Without ``names`` the classes are
    the labels that training images have, so that a set whose labels start at 1 has no class without images.
    A mapping names some of those labels. A sequence names all classes, also those without images; labels may
    then count from 0 or from 1.

    Raises:
        DataError: naming ``where``, because an array has another shape, type or range, or does not fit.
    """
    empty = [part for part, pair in arrays.items() if not len(pair[1])]
    if empty:
        raise DataError(f"{where}: {empty[0]} has no labels; at least one image is needed")
    for part, pair in arrays.items():
        if len(pair[0]) != len(pair[1]):
            raise DataError(f"{where}: {len(pair[1])} labels for {len(pair[0])} images to {part} with")
    images, notes = _pixels({part: pair[0] for part, pair in arrays.items()}, where)
    labels, classes = _numbered({part: pair[1] for part, pair in arrays.items()}, where, names)
    return {part: Split(images[part], labels[part]) for part in arrays}, classes, notes


def _pixels(arrays: Mapping[str, Array], where: str) -> tuple[dict[str, npt.NDArray[np.uint8]], list[str]]:
    kinds = {"i" if array.dtype.kind == "u" else array.dtype.kind for array in arrays.values()}
    if len(kinds) > 1 or not kinds <= set("bif"):
        types = ", ".join(f"{part} {array.dtype}" for part, array in arrays.items())
        raise DataError(f"{where}: images of types that do not go together ({types}); save all as uint8")
    shaped = {part: _shaped(array, f"{where}: {part}") for part, array in arrays.items()}
    if all(array.dtype == np.uint8 for array in shaped.values()):
        return {part: np.ascontiguousarray(array, np.uint8) for part, array in shaped.items()}, []
    factor, offset, notes = _scale(shaped, kinds.pop(), where)
    return {part: _scaled(array, factor, offset) for part, array in shaped.items()}, notes


def _shaped(images: Array, what: str) -> Array:
    """As (N, C, H, W), without a copy."""
    shape = images.shape
    if images.ndim == 2:
        for channels in (1, 3):
            side = math.isqrt(shape[1] // channels)
            if side and side * side * channels == shape[1]:
                return images.reshape(-1, side, side, channels).transpose(0, 3, 1, 2)
        raise DataError(f"{what} has {shape[1]} pixels an image, which is no square; give (N, H, W)")
    if images.ndim == 3:
        return images[:, np.newaxis]
    if images.ndim == 4 and shape[3] in (1, 3):
        return images.transpose(0, 3, 1, 2)
    if images.ndim == 4 and shape[1] in (1, 3):
        return images
    raise DataError(
        f"{what} has shape {shape}; needed is (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3"
    )


def _scale(arrays: Mapping[str, Array], kind: str, where: str) -> tuple[float, float, list[str]]:
    """(factor, offset, notes): a number x is the pixel ``x * factor + offset``."""
    if kind == "b":
        return 255.0, 0.0, []
    least = min(float(array.min()) for array in arrays.values() if array.size)
    most = max(float(array.max()) for array in arrays.values() if array.size)
    if not math.isfinite(least) or not math.isfinite(most):
        raise DataError(f"{where}: images with values that are not finite (NaN or infinity); repair them")
    if kind == "f" and -1 <= least < 0 and most <= 1:
        return 127.5, 127.5, []
    if kind == "f" and least >= 0 and most <= 1:
        return 255.0, 0.0, []
    if least >= 0 and most <= 255:
        dark = [f"{where}: the brightest value is {most:g} of 255; if that is white, scale the images"]
        return 1.0, 0.0, dark if most < _DARK else []
    if kind == "i" and least >= 0 and most < 1 << _DEPTHS[-1]:
        bits = next(bits for bits in _DEPTHS if most < 1 << bits)
        told = f"{where}: values reach {most:,.0f}; they are read as {bits} bits and brought to 8"
        return 255 / ((1 << bits) - 1), 0.0, [told]
    raise DataError(
        f"{where}: images with values from {least:g} to {most:g}; give whole numbers from 0 to 255, "
        "or fractions from 0 to 1"
    )


def _scaled(images: Array, factor: float, offset: float) -> npt.NDArray[np.uint8]:
    eight = np.empty(images.shape, np.uint8)
    for start in range(0, len(images), _CHUNK):
        part = images[start : start + _CHUNK].astype(np.float64) * factor + offset
        eight[start : start + _CHUNK] = np.rint(part)
    return eight


def _numbered(
    arrays: Mapping[str, Array], where: str, names: Mapping[int, str] | Sequence[str]
) -> tuple[dict[str, npt.NDArray[np.int64]], tuple[str, ...]]:
    flat = {part: _flat(array, f"{where}: {part}") for part, array in arrays.items()}
    text = {array.dtype.kind == "U" for array in flat.values()}
    if len(text) > 1:
        raise DataError(f"{where}: some labels are numbers and some are texts; save all as one")
    if not isinstance(names, Mapping) and names:
        if len(names) > MAX_CLASSES:
            raise DataError(f"{where}: {len(names)} classes; up to {MAX_CLASSES} can be used")
        if text == {False}:
            return _from_zero(flat, len(names)), tuple(names)
        known: Array = np.array(names)
    else:
        known = np.unique(flat["train"])
        if text == {False} and int(known[0]) < 0:
            raise DataError(f"{where}: a training label is {known[0]}, but labels go from 0")
    order = np.argsort(known, kind="stable")
    numbered = {}
    for part, labels in flat.items():
        at = np.minimum(np.searchsorted(known[order], labels), len(known) - 1)
        strange = labels[known[order][at] != labels]
        if len(strange):
            part = "training" if part == "train" else part
            some = ", ".join(map(repr, known[:20].tolist())) + (", …" if len(known) > 20 else "")
            raise DataError(
                f"{where}: a {part} label is {strange[0].item()!r}, which no training image has; training "
                f"labels are {some}"
            )
        numbered[part] = order[at].astype(np.int64)
    named = names if isinstance(names, Mapping) else {}
    shown = (str(value) if text == {True} else named.get(int(value), str(value)) for value in known.tolist())
    return numbered, tuple(shown)


def _from_zero(flat: Mapping[str, Array], count: int) -> dict[str, npt.NDArray[np.int64]]:
    """Labels of ``count`` named classes, which may count from 1; `Dataset` checks the rest."""
    whole = {part: labels.astype(np.int64) for part, labels in flat.items()}
    if min(map(np.min, whole.values())) == 1 and max(map(np.max, whole.values())) == count:
        return {part: labels - 1 for part, labels in whole.items()}
    return whole


def _flat(labels: Array, what: str) -> Array:
    """One whole number or text an image."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind == "U" and labels.ndim == 1:
        return labels
    if labels.dtype.kind not in "biuf":
        raise DataError(f"{what}: labels of type {labels.dtype}; give whole numbers, texts or one-hot rows")
    if labels.ndim == 2:
        if not (((labels == 0) | (labels == 1)).all() and (labels.sum(axis=1) == 1).all()):
            raise DataError(
                f"{what}: labels of shape {labels.shape} that are not one-hot; give one class an image"
            )
        return np.asarray(labels.argmax(axis=1))
    if labels.ndim != 1:
        raise DataError(f"{what}: labels of shape {labels.shape}, but one label an image is needed")
    with np.errstate(invalid="ignore"):
        whole = labels.astype(np.int64)
    strange = labels[whole != labels]
    if len(strange):
        raise DataError(f"{what}: a label is {strange[0].item()!r}, which is no whole number from 0")
    return whole
