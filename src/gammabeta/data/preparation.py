"""How pictures become the input of a network: settled once, when it is trained, and kept with the network.

Training, evaluation, prediction, the doctor and an exported file prepare a picture with the same
`Preparation`, so the same file gives the same bits in all of them.
"""

import os
import warnings
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from ..errors import DataError, GammabetaWarning
from ..jsontext import to_json
from .decode import Source, decode, label, planes
from .likeness import Likeness
from .picture import BOX, WORK, Style, find_ink, framed, shrink

Pixels = npt.NDArray[np.uint8]
Greys = npt.NDArray[np.float32]
Shares = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Ink = Literal["light", "dark"]

_STYLES, _FITS, _INKS = ("digit", "object", "plain"), ("crop", "stretch"), ("light", "dark")
_SAMPLE = 1000  # training pictures that tell the style
_FAINT, _FULL = 48, 230  # a background is darker than the one, the ink's brightest pixel at least the other
_OFF_SIZE = 0.15  # of the frame: how far digits of one set differ in size
_OFF = 0.06  # of a side: no digit's centre of mass lies farther from the middle in MNIST
#: The full scale of versions that wrote none: the upper eight bits of sixteen.
_FIRST = 0.0


class BlankError(DataError):
    """A picture on which nothing stands out from the background."""


@dataclass(frozen=True)
class Preparation:
    """How a picture becomes uint8 (channels, height, width).

    Attributes:
        channels: 1 for grey, 3 for colour.
        height: of the network's input.
        width: of the network's input.
        style: ``plain``: resized. ``digit`` and ``object``: a picture that looks like the training's is
            resized
            too; from any other (a photograph of paper) the ink is taken and placed as in the training's.
        fit: of a picture with other proportions, ``crop`` its middle or ``stretch`` it. Run folders and
            ONNX files
            that say nothing of this were made by versions that trained on the one and predicted on the other.
        ink: whether ink is ``light`` on dark or ``dark`` on light in the training pictures.
        box: the share of the frame that a digit fills.
        full: the sample that is white in pictures of more than eight bits; None: each file's own.
        like: what the training pictures looked like.

    Raises:
        DataError: a value that no preparation can have.
    """

    channels: int
    height: int
    width: int
    style: Style = "plain"
    fit: Literal["crop", "stretch"] = "crop"
    ink: Ink = "light"
    box: float = BOX
    full: float | None = None
    like: Likeness | None = None

    def __post_init__(self) -> None:
        if self.channels not in (1, 3) or min(self.height, self.width) < 1:
            raise DataError(
                f"a picture has 1 or 3 channels and at least 1×1 pixels, "
                f"not {self.channels} and {(self.height, self.width)}"
            )
        known = self.style in _STYLES and self.fit in _FITS and self.ink in _INKS
        scaled = not self.full or 1 <= self.full <= 65535
        fitting = self.like is None or len(self.like.mean) == (5 if self.channels == 1 else 8)
        if not (known and scaled and fitting and 0.1 <= self.box <= 1):
            raise DataError("the preparation of pictures cannot be: it is damaged")

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.height, self.width

    def prepare(self, source: Source, *, blank: bool = False) -> Pixels:
        """Read a picture of any common format and size as uint8 (channels, H, W), C-contiguous.

        Args:
            source: the picture's file, or its bytes.
            blank: take a picture on which nothing stands out as it is, as training does.

        Raises:
            DataError: no picture, a damaged one, or one that takes too much memory; `BlankError`: nothing
                on it stands out from the background (styles ``digit`` and ``object``).
        """
        return self.prepared(source, blank=blank)[0]

    def prepared(self, source: Source, *, blank: bool = False) -> tuple[Pixels, bool]:
        """As `prepare`, and whether the picture had to be brought to the style."""
        if (
            self.style == "plain" or self.fit == "crop"
        ):  # with "stretch", a style was applied to every picture
            plain, whole = self.resized(source)
            if self.style == "plain" or (whole and self.obeyed_by(plain)):
                return plain, False
        ink = find_ink(np.asarray(shrink(decode(source, "L", at_least=2 * WORK, full=self.full)), np.float32))
        if ink is None:
            if blank:
                return self.resized(source)[0], False
            raise BlankError(
                f"{label(source)}: nothing stands out from the background; is the picture blank?"
            )
        placed = framed(ink, self.size, self.style, self.box)
        placed = placed if self.ink == "light" else 255 - placed
        return np.repeat(placed[np.newaxis], self.channels, axis=0), True

    def obeyed_by(self, picture: Pixels) -> bool:
        """Whether a picture (C, H, W) has the background, and a digit the place, that the style asks for."""
        grey = _as_light(picture.mean(0, dtype=np.float32), self.ink)
        ring = _ring(grey[np.newaxis])[0]
        if np.quantile(ring, 0.5 if self.style == "digit" else 0.25) > _FAINT:
            return False
        if grey.max() <= _FAINT:
            return False
        if self.style != "digit":
            return True
        (longer,), _, _ = _extents(grey[np.newaxis])
        return abs(longer - self.box) <= _OFF_SIZE and bool(_centred(grey[np.newaxis])[0])

    def learned(self, images: Pixels) -> "Preparation":
        """The preparation with the style of training pictures (N, C, H, W) that are only resized."""
        style, ink, box = _style(images[:: -(-len(images) // _SAMPLE)])
        return replace(self, style=style, ink=ink, box=box)

    def knowing(self, images: Pixels) -> "Preparation":
        """The preparation with what prepared training pictures (N, C, H, W) look like."""
        return replace(self, like=Likeness.of(images))

    def words(self) -> str:
        """What is done with a picture, in one line."""
        deep = "" if not self.full else f"; of more than 8 bits, {self.full:g} is white"
        if self.style == "plain":
            way = "their middle, resized" if self.fit == "crop" else "stretched"
            return f"taken as they are: {way} to {self.height}×{self.width}{deep}"
        place = f"{self.box:.0%} of the frame, centred" if self.style == "digit" else "filling the frame"
        ground = "dark" if self.ink == "light" else "light"
        ours = f"{self.ink} ink on {ground}, {place}"
        return f"{ours}; other pictures are brought to that (style {self.style}){deep}"

    def resized(self, source: Source) -> tuple[Pixels, bool]:
        """A picture that is resized and no more, and whether that cut (nearly) nothing off."""
        height, width = self.size
        mode = "L" if self.channels == 1 else "RGB"
        picture = decode(source, mode, at_least=2 * max(height, width), full=self.full)
        across, down = picture.width * height, picture.height * width
        if picture.size != (width, height):
            if self.fit == "crop":
                picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
            else:
                picture = picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
        return np.array(planes(picture), order="C"), abs(across - down) <= 0.02 * max(across, down)


def preparation_of(document: object) -> Preparation:
    """The preparation that a run folder or an ONNX file keeps as plain values.

    Raises:
        DataError: a value is missing, or of another type or range. Fields of a later version are ignored,
            with a ``GammabetaWarning``.
    """
    from pydantic import TypeAdapter, ValidationError

    try:  # as JSON, in which a list can be a tuple, and a text is no number
        found = TypeAdapter(Preparation).validate_json(to_json(document), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"{str(part)[:60]}: " for part in first["loc"])
        raise DataError(where + first["msg"].removeprefix("Value error, ")[:200]) from None
    except (TypeError, ValueError, RecursionError):
        raise DataError("the preparation of pictures is damaged") from None
    known = {field.name for field in fields(Preparation)}
    if isinstance(document, dict) and (strange := sorted(set(document) - known)):
        told = ", ".join(name[:60] for name in strange[:5])
        message = (
            f"the preparation of pictures has fields that this version does not know and ignores: {told}"
        )
        warnings.warn(message, GammabetaWarning, stacklevel=2)
    return found


def earlier(channels: int, size: tuple[int, int], style: Style | None) -> Preparation:
    """How versions that kept no preparation prepared a picture for a prediction."""
    return Preparation(channels, *size, style or _default(channels), "stretch", full=_FIRST)


def earlier_training(channels: int, size: tuple[int, int]) -> Preparation:
    """How the same versions read a folder of pictures."""
    return Preparation(channels, *size, full=_FIRST)


def load_picture(
    path: str | os.PathLike[str],
    *,
    channels: int,
    size: tuple[int, int],
    style: Style | None = None,
) -> Pixels:
    """Read a picture of any common format and size as the input of a network.

    A network of a run folder has a `Preparation` of its own
    (``gammabeta.train.load_model(run).preparation``).

    Args:
        path: the picture: PNG, JPEG, BMP, GIF, WebP, TIFF and others; EXIF orientation and transparency are
            obeyed.
        channels: 1 for grey, 3 for colour.
        size: (H, W) of the network's input.
        style: how it is prepared (see `Style`); by default ``digit`` for one channel, ``plain`` for three.

    Returns:
        uint8 of shape (channels, H, W), C-contiguous.

    Raises:
        DataError: no picture, a damaged one or one that takes too much memory; nothing on it stands out from
            the background (styles ``digit`` and ``object``); or ``channels`` or ``size`` is none that a
            picture can have.
    """
    return Preparation(channels, *size, style or _default(channels)).prepare(path)


def flat_pictures(images: Pixels) -> npt.NDArray[np.int64]:
    """The numbers of the pictures (N, C, H, W) that are one flat colour."""
    lines = images.reshape(len(images), images.shape[1], -1)
    some = lines[..., :: max(1, lines.shape[2] // 40)]  # rules out nearly all, at a twentieth of the cost
    maybe = np.flatnonzero((some == some[..., :1]).all((1, 2)))
    rest = lines[maybe]
    found: npt.NDArray[np.int64] = maybe[(rest == rest[..., :1]).all((1, 2))]
    return found


def _default(channels: int) -> Style:
    return "digit" if channels == 1 else "plain"


def _as_light(grey: Greys, ink: str) -> Greys:
    return grey if ink == "light" else 255 - grey


def _ring(grey: Greys) -> Greys:
    """The outermost pixels of (N, H, W)."""
    return np.concatenate([grey[:, 0], grey[:, -1], grey[:, 1:-1, 0], grey[:, 1:-1, -1]], axis=1)


def _centred(light: Greys) -> Flags:
    """Whether the centre of mass of the ink is in the middle, (N,)."""
    mass = np.where(light > _FAINT / 2, light, 0).astype(np.float64)
    total = np.maximum(mass.sum((1, 2)), 1e-9)
    most, centred = max(_OFF, 1.5 / min(light.shape[1:])), np.ones(len(light), bool)
    for axis in (1, 2):
        side = light.shape[axis]
        centre = (mass.sum(3 - axis) * np.arange(side)).sum(1) / total
        centred &= np.abs(centre - (side - 1) / 2) <= most * side
    return centred


def _extents(light: Greys) -> tuple[Shares, Shares, Flags]:
    """The ink's longer and shorter side as shares of the frame, and whether it is in the middle; (N,)."""
    seen, sides, middle = light > 16, [], np.ones(len(light), bool)
    for axis in (2, 1):
        line: Flags = np.asarray(seen.any(axis))
        first, last = line.argmax(1), line[:, ::-1].argmax(1)
        sides.append(1 - (first + last) / line.shape[1])
        middle &= np.abs(first - last) <= 4
    return np.maximum(*sides), np.minimum(*sides), middle


_PLAIN: tuple[Style, Ink, float] = ("plain", "light", BOX)


def _style(images: Pixels) -> tuple[Style, Ink, float]:
    """The style, ink and box of pictures (N, C, H, W): what nearly all of them have in common, else plain."""
    grey = images.mean(1, dtype=np.float32)
    colourful = images.shape[1] == 3 and float((images.max(1) - images.min(1)).mean()) > 6
    if colourful or min(grey.shape[1:]) < 4:
        return _PLAIN
    ink: Ink = "light" if float(np.median(_ring(grey))) < 128 else "dark"
    light = _as_light(grey, ink)
    light = light[light.reshape(len(light), -1).max(1) > _FAINT]  # blank ones tell nothing
    if not len(light):
        return _PLAIN
    ring, brightest = _ring(light), light.reshape(len(light), -1).max(1)
    clean = (np.quantile(ring, 0.25, axis=1) <= _FAINT / 2) & (brightest >= _FULL)
    if clean.mean() < 0.9:
        return _PLAIN
    longer, shorter, middle = _extents(light)
    free = np.asarray(np.median(ring, axis=1) <= _FAINT / 2) & _centred(light)
    low, box, high = (float(value) for value in np.quantile(longer, [0.1, 0.5, 0.9]))
    if free.mean() >= 0.9 and 0.3 <= box <= 0.97 and high - low <= 0.15:
        return "digit", ink, BOX if abs(box - BOX) < 0.04 else box
    if ((longer >= 0.95) & middle).mean() >= 0.75 and shorter.mean() < 0.95:
        return "object", ink, BOX
    return _PLAIN
