"""A picture file, decoded and checked: the one place where Pillow meets bytes we do not trust."""

import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

from ..errors import DataError, UnavailableError
from ..memory import available
from ..memory import size as in_words
from .stream import reason, regular_file

#: The most memory that decoding one picture may take on any machine. 35 million pixels in colour, with
#: transparency, take 350 million; a JPEG of 200 million pixels, decoded at an eighth of its size, takes 20.
MAX_DECODING = 400_000_000

#: Where that is no more than a quarter of what is free: WebP and AVIF of 88 million pixels, PNG of 160.
MAX_WITH_ROOM = 1_600_000_000

#: No side of a picture may be longer; a strip of 1 × 50,000,000 pixels is nobody's photograph.
MAX_EDGE = 32_768

#: A picture: its file, or its bytes, which errors call "standard input" unless they are `Encoded`.
Source = str | os.PathLike[str] | io.BytesIO

#: Pillow reads more formats than these. Left out: those that start other programs (EPS), that have no magic
#: number and so take any bytes for a picture (TGA), and that nobody keeps photographs or drawings in.
FORMATS = ("PNG", "JPEG", "MPO", "BMP", "GIF", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000", "HEIF")

#: File names that hold pictures, in lower case.
SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".heic", ".heif",
)  # fmt: skip
_HEIC = (".heic", ".heif")  # Pillow reads these with the plugin pillow-heif
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1")

_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_SCALED = ("JPEG", "MPO")
_COPIED = ("WEBP", "AVIF", "JPEG2000")  # their decoders hold copies of their own
_MAX_SAMPLE = (281, 341)  # TIFF: MaxSampleValue, SMaxSampleValue
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_GREY = ("1", "L", "LA", "La", *_DEEP)


class Encoded(io.BytesIO):
    """A picture's bytes that are no file of their own, and what to call it."""

    def __init__(self, name: str, content: bytes) -> None:
        super().__init__(content)
        self.called = name

    def __str__(self) -> str:
        return self.called


def is_grey(picture: Image.Image) -> bool:
    """Whether the picture holds shades of grey only, told without decoding its pixels."""
    if picture.mode in ("P", "PA"):
        colours = np.frombuffer(bytes(picture.getpalette("RGB") or b""), np.uint8).reshape(-1, 3)
        return bool((colours == colours[:, :1]).all())
    return picture.mode in _GREY


def label(source: Source) -> str:
    """What an error calls a picture."""
    if isinstance(source, io.BytesIO):
        return str(source) if isinstance(source, Encoded) else "standard input"
    return str(Path(source))


def open_picture(source: Source) -> Image.Image:
    """Open a picture and check its header; its pixels stay in the file, which the caller closes.

    `DataError` if it is no picture in one of `FORMATS`, or longer than `MAX_EDGE`; `UnavailableError` if it
    is HEIC and Pillow's plugin for that is not installed.
    """
    name = label(source)
    if isinstance(source, io.BytesIO):
        source.seek(0)
        empty = not source.getbuffer().nbytes
    else:
        empty = regular_file(Path(source)) == 0
    if empty:
        raise DataError(f"{name}: an empty file, not a picture")
    heic = _is_heic(source)
    _init(heic)
    formats = [each for each in FORMATS if each in Image.OPEN]
    try:
        with warnings.catch_warnings(), _any_number_of_pixels():
            warnings.simplefilter("ignore")
            picture = Image.open(source, formats=formats)
    except UnidentifiedImageError:
        if heic and "HEIF" not in Image.OPEN:
            raise UnavailableError(
                f"{name}: HEIC is read with Pillow's plugin: pip install pillow-heif; or save it as JPEG"
            ) from None
        raise DataError(f"{name}: not a picture in a format read here; save it as PNG or JPEG") from None
    except Exception as error:  # Pillow's parsers raise whatever the bytes lead them to
        raise DataError(f"{name}: cannot be read as a picture ({reason(error)})") from None
    width, height = picture.size
    if max(width, height) > MAX_EDGE or min(width, height) < 1:
        picture.close()
        raise DataError(f"{name}: {width}×{height} pixels; up to {MAX_EDGE:,} on a side can be read")
    return picture


def _is_heic(source: Source) -> bool:
    """Whether a picture is called HEIC or, where it is bytes without a name, begins as such."""
    if isinstance(source, io.BytesIO):
        head = bytes(source.getbuffer()[4:12])
        return head[:4] == b"ftyp" and head[4:] in _HEIC_BRANDS
    return label(source).lower().endswith(_HEIC)


def _init(heic: bool) -> None:
    """Register Pillow's formats: what this build lacks must not be named; HEIC where its plugin is there."""
    Image.init()
    if heic and "HEIF" not in Image.OPEN and find_spec("pillow_heif"):
        import pillow_heif

        pillow_heif.register_heif_opener()


_PILLOW = threading.Lock()


@contextmanager
def _any_number_of_pixels() -> Iterator[None]:
    """Let Pillow open a header of any size: what decoding takes is checked by `_room` before it begins."""
    with _PILLOW:
        most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = most


def _room(picture: Image.Image, mode: str, at_least: int | None) -> int:
    """Bytes that decoding takes at its highest: as held by Pillow, and the copies that `_convert` makes."""
    width, height = picture.size
    pixels, coefficients = width * height, 0
    if picture.format in _SCALED:
        if "progressive" in picture.info:  # every coefficient is held, in two bytes, whatever the scale
            parts = [(part[1], part[2]) for part in getattr(picture, "layer", [])] or [(1, 1)]
            most = max(h for h, _ in parts) * max(v for _, v in parts)
            coefficients = 2 * pixels * sum(h * v for h, v in parts) // most
        room = min(width, height) // at_least if at_least else 1
        pixels //= max(scale for scale in (1, 2, 4, 8) if scale <= max(room, 1)) ** 2
    held, wanted = _depth(picture), 1 if mode == "L" else 4
    if picture.mode in _DEEP:
        need = 3 * held + 1 + wanted
    elif picture.mode in _ALPHA or "transparency" in picture.info:
        need = held + (0 if picture.mode in ("LA", "RGBA") else 4) + 2 + wanted
    else:
        need = held + wanted
    copies = 2.5 * held if picture.format in _COPIED else 0
    return int(pixels * (need + copies)) + coefficients


def _allowed(need: int) -> bool:
    return need <= MAX_DECODING or need <= _most()  # what is free is asked only where it matters


def _most() -> int:
    return max(MAX_DECODING, min(MAX_WITH_ROOM, (available() or 0) // 4))


def _depth(picture: Image.Image) -> int:
    """Bytes that a decoded pixel takes: Pillow holds colour in four whether or not it is transparent."""
    if picture.mode in ("1", "L", "P"):
        return 1
    return 2 if picture.mode.startswith("I;16") else 4


def decode(
    source: Source, mode: str, *, at_least: int | None = None, full: float | None = None
) -> Image.Image:
    """Decode the first frame of a picture, upright, as ``"L"`` (grey) or ``"RGB"``.

    Transparent parts become white under dark content and black under light content, so that what was drawn
    stands out. Samples of more than eight bits are scaled so that ``full`` is white (see `full_scale`); by
    default the file's own full scale.

    A picture far larger than ``at_least`` in both directions may come out smaller, but not below it.
    """
    name = label(source)
    picture = open_picture(source)
    need = _room(picture, mode, at_least)
    if not _allowed(need):
        size = f"{picture.width}×{picture.height}"
        picture.close()
        raise DataError(
            f"{name}: {size} pixels take {in_words(need)} to decode; up to {in_words(_most())} are "
            "allowed here; make it smaller, or save it as JPEG, which is decoded at a fraction of its size"
        )
    try:
        with picture:
            if at_least is not None and picture.format in _SCALED:
                picture.draft(None, (at_least, at_least))  # JPEG decodes at 1/2, 1/4 or 1/8 for less
            _load(picture)
            return _convert(picture, mode, full)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise DataError(f"{name}: damaged picture ({reason(error)}); save or copy it again") from None


def _load(picture: Image.Image) -> None:
    """Decode the pixels, and turn them upright."""
    # Pillow reads colours of 16 bits by their upper byte: it is named in what its decoder is told.
    deep_colour = picture.mode not in _DEEP and any(
        ";16" in str(tile[3]) for tile in getattr(picture, "tile", [])
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture.load()
        ImageOps.exif_transpose(picture, in_place=True)
    if deep_colour:
        bands = [
            extent for extent, band in zip(_extents(picture), picture.getbands(), strict=True) if band != "A"
        ]
        highest = max(extent[1] for extent in bands)
        if highest < 64:
            raise DataError(
                f"colours of 16 bits that fill only the lower {highest.bit_length() + 8}, which would be "
                "nearly black; scale them to the full range, or save the picture with 8 bits"
            )


def _extents(picture: Image.Image) -> list[tuple[int, int]]:
    """(lowest, highest) of each band."""
    return [picture.getchannel(band).getextrema() for band in picture.getbands()]  # type: ignore[misc]


def is_deep(picture: Image.Image) -> bool:
    """Whether the samples have more than eight bits, told without decoding."""
    return picture.mode in _DEEP


def highest_sample(source: Source) -> float:
    """The highest sample of a picture of more than eight bits, or the white that its file states."""
    with open_picture(source) as picture:
        if not _allowed(_room(picture, "L", None)):
            return 0.0  # `decode` refuses it
        try:
            stated = _stated(picture)
            return stated if stated is not None else _highest(np.asarray(picture))
        except Exception as error:
            raise DataError(f"{label(source)}: damaged picture ({reason(error)}); copy it again") from None


def full_scale(highest: float, *, floating: bool = False) -> float:
    """The sample that is white, where the highest is known: 1 for floating point up to 1, else 2^b - 1.

    12-bit data in 16-bit files are so scaled by 4095, 8-bit data by 255.
    """
    if floating and highest <= 1.0:
        return 1.0
    bits = int(max(highest, 0)).bit_length()
    return float((1 << min(max(bits, 8), 16)) - 1)


def planes(picture: Image.Image) -> npt.NDArray[np.uint8]:
    """The pixels of a picture in ``"L"`` or ``"RGB"``, (C, H, W)."""
    pixels: npt.NDArray[np.uint8] = np.asarray(picture)
    return pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _convert(picture: Image.Image, mode: str, full: float | None) -> Image.Image:
    if picture.mode in _DEEP:
        stated = _stated(picture) if full is None else None
        return Image.fromarray(_eight_bits(np.asarray(picture), full or stated, full == 0)).convert(mode)
    if picture.mode not in _ALPHA and "transparency" not in picture.info:
        return picture.copy() if picture.mode == mode else picture.convert(mode)
    if picture.mode not in ("LA", "RGBA"):
        picture = picture.convert("RGBA")
    alpha = picture.getchannel("A")
    seen = picture.convert(mode)
    seen.paste(_behind(seen, alpha), mask=ImageChops.invert(alpha))
    return seen


def _behind(picture: Image.Image, alpha: Image.Image) -> int | tuple[int, int, int]:
    """White behind dark content, black behind light; the mean is weighted with the opacity."""
    small = (64, 64)
    light = np.asarray(picture.convert("L").resize(small, Image.Resampling.BOX), np.float64)
    weight = np.asarray(alpha.resize(small, Image.Resampling.BOX), np.float64)
    mean = (light * weight).sum() / weight.sum() if weight.any() else 0.0
    shade = 0 if mean > 127 else 255
    return shade if picture.mode == "L" else (shade, shade, shade)


def _stated(picture: Image.Image) -> float | None:
    """The sample that is white by the file's own statement, where it makes one below the type's highest."""
    tags = getattr(picture, "tag_v2", {})
    for tag in _MAX_SAMPLE:
        value = tags.get(tag)
        value = value[0] if isinstance(value, tuple) and value else value
        if isinstance(value, int | float) and 1 <= value < 65535:
            return float(value)
    bits = tags.get(258)  # BitsPerSample
    bits = bits[0] if isinstance(bits, tuple) and bits else bits
    return float((1 << bits) - 1) if isinstance(bits, int) and 8 < bits < 16 else None


def _highest(samples: npt.NDArray[Any]) -> float:
    finite = samples[np.isfinite(samples)] if samples.dtype.kind == "f" else samples
    return float(finite.max()) if finite.size else 0.0


def _eight_bits(samples: npt.NDArray[Any], full: float | None, first: bool) -> npt.NDArray[np.uint8]:
    """Samples of 16 or 32 bits or floating point on the scale from 0 to 255, of which ``full`` is the end.

    Without ``full``: the full scale of these samples. ``first``: as version 0.1 did, the upper eight of 16.
    """
    floating = samples.dtype.kind == "f"
    if first:
        highest = _highest(samples)
        wide = samples.dtype.itemsize == 2 or highest > 255  # Pillow widens some 8-bit files to 32 bits, too
        full = (1.0 if highest <= 1.0 else 255.0) if floating else (65535.0 if wide else 255.0)
    if not full:
        full = full_scale(_highest(samples), floating=floating)
    if floating:
        samples = np.nan_to_num(samples, nan=0.0, posinf=full, neginf=0.0)
        return np.asarray(np.clip(samples * (255.0 / full), 0, 255), np.uint8)
    samples = np.clip(samples, 0, min(int(full), 65535))
    if full >= 255 and not (int(full) + 1) & int(full):  # whole bits: the upper eight of them
        return np.asarray(samples >> (int(full).bit_length() - 8), np.uint8)
    return np.asarray(np.clip(np.rint(samples * (255.0 / full)), 0, 255), np.uint8)
