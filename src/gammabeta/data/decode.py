"""A picture file, decoded and checked: the one place where Pillow meets bytes we do not trust."""

import io
import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

from ..errors import DataError, UnavailableError
from .stream import reason, regular_file

#: A telephone's largest photograph has 50 million pixels. JPEG decodes it at a fraction of its size …
MAX_PIXELS = 51_000_000

#: … but the other formats decode whole: in colour, four bytes a pixel, 25 million pixels are this.
MAX_DECODED = 102_000_000

#: No side of a picture may be longer; a strip of 1 × 50,000,000 pixels is nobody's photograph.
MAX_EDGE = 32_768

#: Pillow reads more formats than these. Left out: those that start other programs (EPS), that have no magic
#: number and so take any bytes for a picture (TGA), and that nobody keeps photographs or drawings in.
FORMATS = ("PNG", "JPEG", "MPO", "BMP", "GIF", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000", "HEIF")

#: File names that hold pictures, in lower case.
SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".heic", ".heif",
)  # fmt: skip
_HEIC = (".heic", ".heif")  # Pillow reads these with the plugin pillow-heif

_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_SCALED = ("JPEG", "MPO")
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_GREY = ("1", "L", "LA", "La", *_DEEP)


class Encoded(io.BytesIO):
    """A picture's bytes that are no file of their own, and what to call it."""

    def __init__(self, name: str, content: bytes) -> None:
        super().__init__(content)
        self.called = name

    def __str__(self) -> str:
        return self.called


Source = str | os.PathLike[str] | Encoded


def is_grey(picture: Image.Image) -> bool:
    """Whether the picture holds shades of grey only, told without decoding its pixels."""
    if picture.mode in ("P", "PA"):
        colours = np.frombuffer(bytes(picture.getpalette("RGB") or b""), np.uint8).reshape(-1, 3)
        return bool((colours == colours[:, :1]).all())
    return picture.mode in _GREY


def open_picture(path: Source) -> Image.Image:
    """Open a picture and check its header; its pixels stay in the file, which the caller closes.

    `DataError` if it is no picture in one of `FORMATS`, or larger than `MAX_PIXELS` or `MAX_EDGE`;
    `UnavailableError` if it is HEIC and Pillow's plugin for that is not installed.
    """
    path = path if isinstance(path, Encoded) else Path(path)
    if (path.getbuffer().nbytes if isinstance(path, Encoded) else regular_file(path)) == 0:
        raise DataError(f"{path}: an empty file, not a picture")
    _init(path)
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limit on the size stands below
            picture = Image.open(path, formats=formats)
    except UnidentifiedImageError:
        if str(path).lower().endswith(_HEIC) and "HEIF" not in Image.OPEN:
            raise UnavailableError(
                f"{path}: HEIC is read with Pillow's plugin: pip install pillow-heif; or save it as JPEG"
            ) from None
        raise DataError(f"{path}: not a picture in a format read here; save it as PNG or JPEG") from None
    except Image.DecompressionBombError:
        raise DataError(f"{path}: more than {MAX_PIXELS:,} pixels; make it smaller") from None
    except Exception as error:  # Pillow's parsers raise whatever the bytes lead them to
        raise DataError(f"{path}: cannot be read as a picture ({reason(error)})") from None
    width, height = picture.size
    most = MAX_PIXELS if picture.format in _SCALED else min(MAX_PIXELS, MAX_DECODED // _depth(picture))
    if width * height > most or max(width, height) > MAX_EDGE or min(width, height) < 1:
        picture.close()
        raise DataError(
            f"{path}: {width}×{height} pixels; of this kind up to {most:,}, and {MAX_EDGE:,} on a side, "
            "can be read; make it smaller"
        )
    return picture


def _init(path: Path | Encoded) -> None:
    """Register Pillow's formats: what this build lacks must not be named; HEIC where its plugin is there."""
    Image.init()
    if "HEIF" not in Image.OPEN and str(path).lower().endswith(_HEIC) and find_spec("pillow_heif"):
        import pillow_heif

        pillow_heif.register_heif_opener()


def _depth(picture: Image.Image) -> int:
    """Bytes that a decoded pixel takes: Pillow holds colour in four whether or not it is transparent."""
    if picture.mode in ("1", "L", "P"):
        return 1
    return 2 if picture.mode.startswith("I;16") else 4


def decode(path: Source, mode: str, *, at_least: int | None = None) -> Image.Image:
    """Decode the first frame of a picture, upright, as ``"L"`` (grey) or ``"RGB"``.

    Transparent parts become white under dark content and black under light content, so that what was drawn
    stands out. Samples of 16 bits keep their upper eight.

    A picture far larger than ``at_least`` in both directions may come out smaller, but not below it.
    """
    picture = open_picture(path)
    try:
        with warnings.catch_warnings(), picture:
            warnings.simplefilter("ignore")
            if at_least is not None and picture.format in _SCALED:
                picture.draft(None, (at_least, at_least))  # JPEG decodes at 1/2, 1/4 or 1/8 for less
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
            return _convert(picture, mode)
    except Exception as error:  # as above
        raise DataError(f"{path}: damaged picture ({reason(error)}); save or copy it again") from None


def planes(picture: Image.Image) -> npt.NDArray[np.uint8]:
    """The pixels of a picture in ``"L"`` or ``"RGB"``, (C, H, W)."""
    pixels: npt.NDArray[np.uint8] = np.asarray(picture)
    return pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _convert(picture: Image.Image, mode: str) -> Image.Image:
    if picture.mode in _DEEP:
        return Image.fromarray(_eight_bits(np.asarray(picture))).convert(mode)
    if picture.mode not in _ALPHA and "transparency" not in picture.info:
        return picture.convert(mode)
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


def _eight_bits(samples: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Samples of 16 or 32 bits or floating point, on the scale from 0 to 255."""
    if samples.dtype.kind == "f":
        samples = np.nan_to_num(samples, nan=0.0, posinf=255.0, neginf=0.0)
        samples = np.clip(samples * (255.0 if samples.max() <= 1.0 else 1.0), 0, 255)
    else:
        if samples.dtype.itemsize > 2:
            samples = np.clip(samples, 0, 65535)
        # Pillow widens some 8-bit files to 32 bits, too.
        if samples.dtype.itemsize == 2 or samples.max() > 255:
            samples = samples >> 8
    eight: npt.NDArray[np.uint8] = samples.astype(np.uint8)
    return eight
