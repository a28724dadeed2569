"""Any picture of a digit, letter or thing, as the network saw its like in training.

A network that learned MNIST has only ever seen light ink on black, 20 pixels tall or wide, its centre of
mass in the middle of 28×28 (LeCun, Cortes and Burges, "The MNIST database of handwritten digits"). A
photograph of a pencil stroke is none of that. The steps from one to the other:

1. the background, a smooth surface fitted to the picture's rim, is taken away: paper in uneven light
becomes flat; 2. what differs from it is ink, whichever way it differs: dark on light and light on dark come
out alike; 3. specks are dropped, and the picture is cropped to the ink; 4. thin lines are thickened to a
pen's width, because a hair of ink would vanish in the next step; 5. the ink is scaled into the box, and
placed so that its centre of mass is the middle.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from .pieces import Mask, Pieces
from .ruling import without_frames, without_lines

#: How a picture is prepared: ``digit`` as MNIST, ``object`` as Fashion-MNIST (cropped to fill the frame,
#: light on dark), ``plain`` resized and nothing else.
Style = Literal["digit", "object", "plain"]

Array = npt.NDArray[np.float32]

#: Ink is looked for at this scale: fine enough for a frame of 28, coarse enough that noise averages out.
WORK = 400
#: MNIST's ink fills 20 of 28 pixels.
BOX = 20 / 28
#: A stroke thinner than this share of the ink's longer side is thickened to it. MNIST: median 0.13, 5 %
#: below 0.09.
_STROKE = 0.08
#: Where ink begins: below this of 255, beside an edge, it may be what JPEG leaves there. A picture no
#: larger than `_FINE` is believed to the last pixel: in MNIST itself the faintest pixels count.
_EDGE, _FINE = 48, 56
#: A piece of ink smaller than this share of the largest piece is a speck. The dot of an i has 0.03 or more.
_SPECK = 0.015
#: What stands out less, of 255, is no ink.
_LEAST = 16
#: A background with less noise is no photograph.
_CLEAN = 0.5
#: Fainter than this share of the darkest ink there is neither ink nor printed line.
_FAINTEST = 0.12
#: A background is uneven if a tenth of the rim is farther from the smooth surface; then it is sought in a
#: window of this share of the longer side, wider than any stroke.
_UNEVEN, _WINDOW = 12.0, 0.25
#: Ink that covers more of the picture than this is wide, or cropped tightly: no window is wider.
_MUCH = 0.13


def find_ink(grey: Array) -> Array | None:
    """Separate ink, dark or light, from the background of ``grey`` (H, W), 0 to 255.

    Lines of the paper, frames and specks are left out.

    Returns:
        (h, w), cropped to the ink: 0 where there is none, about 255 where it is full; None for a blank
        picture.
    """
    ink, noise = _above_background(grey)
    floor = max(4.0 * noise, 2.0)  # below this a difference means nothing
    if np.count_nonzero(ink > floor) == 0 or ink.max() < _LEAST:
        return None
    large = max(grey.shape) > _FINE
    if large:
        seen = ink > max(floor, _FAINTEST * float(ink.max()))
        printed = seen & ~without_frames(without_lines(seen))
        ink = np.where(printed, 0, ink)
    full = float(np.percentile(ink[ink > ink.max() / 2], 75))
    full = 255.0 if full > 235 else full  # full contrast already: leave every pixel as it is
    if noise > _CLEAN or (large and printed.any()):
        # A photograph or JPEG: its noise and shadows must not become grey haze around the digit.
        low = max(floor, 0.2 * full)
        ink = (ink - low) * (full / max(full - low, 1.0))
    ink = np.clip(ink * (255.0 / full), 0, 255)
    kept = ink * _of_the_digit(ink > 96, large)
    seen = kept > (_EDGE if max(kept.shape) > _FINE else 0)
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    return np.ascontiguousarray(kept[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], np.float32)


def shrink(picture: Image.Image) -> Image.Image:
    """No side above the working scale; pixels are averaged, which averages noise away too."""
    longest = max(picture.size)
    if longest <= WORK:
        return picture
    width, height = (max(1, round(side * WORK / longest)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BOX, reducing_gap=3.0)


def _above_background(grey: Array) -> tuple[Array, float]:
    """How far each pixel stands out from the background, to the side on which the ink is; and the noise."""
    surface, noise, even = _background(grey)
    difference = grey - surface
    floor = max(4.0 * noise, 2.0)
    ink = max(np.maximum(difference, 0), np.maximum(-difference, 0), key=lambda side: _energy(side, floor))
    strong = ink > 0.6 * np.percentile(ink, 99.5)
    rim = max(1, round(0.04 * min(grey.shape)))
    edges = (strong[:rim], strong[-rim:], strong[:, :rim], strong[:, -rim:])
    # Ink that is cut by all four edges of the picture is cropped too tightly to be told from a shadow.
    tight = strong.mean() > _MUCH and all(edge.any() for edge in edges)
    if even or tight or noise <= _CLEAN or max(grey.shape) <= _FINE:
        return ink, noise
    smooth = np.asarray(
        Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).filter(ImageFilter.MedianFilter(5)),
        np.float32,
    )
    sides = _above_shadows(grey, smooth), _above_shadows(255 - grey, 255 - smooth)
    found, scatter, _ = max(sides, key=lambda side: side[2])
    return (found, scatter) if found.max() >= max(_LEAST, 4.0 * scatter) else (ink, noise)


def _above_shadows(grey: Array, smooth: Array) -> tuple[Array, float, float]:
    """Dark ink on a background that no smooth surface follows, such as the edge of a shadow.

    The background is a closing: what is darker than all around it, and nowhere as wide as the window, is
    filled. On paper ink and light multiply, so the difference is scaled to the light of the brightest part.

    Returns:
        Ink (H, W), its noise, and the energy that is found in narrow windows: that of strokes is, that of the
        paper which they enclose is not.
    """
    energies = []
    for share in (_WINDOW / 6, _WINDOW / 3, _WINDOW / 2, _WINDOW):
        window = 2 * round(share * max(grey.shape) / 2) + 1
        background = -_highest(-_highest(smooth, window), window)
        difference = background - grey
        difference *= float(np.percentile(background, 95)) / np.maximum(background, 16)
        middle = float(np.median(difference))
        noise = 1.4826 * float(np.median(np.abs(difference - middle)))
        ink = np.maximum(difference - middle, 0).astype(np.float32)
        energies.append(_energy(ink, 4.0 * noise))
    return ink, noise, sum(energies[:-1])


def _highest(plane: Array, window: int) -> Array:
    """The highest value in a square window (of odd width) around each pixel, (H, W)."""
    for _ in range(2):
        part, width = np.pad(plane, ((window // 2,) * 2, (0, 0)), mode="edge"), 1
        while width < window:  # each value is the highest of `width` rows from its own on
            step = min(width, window - width)
            part, width = np.maximum(part[:-step], part[step:]), width + step
        plane = part.T
    return plane


def _background(grey: Array) -> tuple[Array, float, bool]:
    """The paper: a quadratic surface through the rim, the noise (standard deviation), and whether it fits.

    Ink that touches the rim is left out of the fit: it is refitted three times to the pixels near the last
    surface.
    """
    height, width = grey.shape
    rim = max(1, round(0.04 * min(height, width)))
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    edge = np.ones(grey.shape, bool)
    edge[rim : height - rim, rim : width - rim] = False
    terms = np.stack([np.ones_like(x), x, y, x * y, x * x, y * y], axis=-1)
    at, values = terms[edge], grey[edge]
    surface = np.full(values.shape, np.median(values), np.float32)
    coefficients = np.array([surface[0], 0, 0, 0, 0, 0], np.float32)
    noise = 0.0
    for _ in range(3):
        off = np.abs(values - surface)
        # 1.4826: the standard deviation of Gaussian noise, from its median absolute deviation
        noise = 1.4826 * float(np.median(off))
        near = off <= max(3.0 * noise, 24.0)
        if np.count_nonzero(near) < 60:
            break  # a rim this short fixes no surface: the median stands
        some = at[near].astype(np.float64)  # the normal equations: 6 by 6, whatever the picture's size
        solved = np.linalg.lstsq(some.T @ some, some.T @ values[near], rcond=None)[0]
        coefficients = solved.astype(np.float32)
        surface = at @ coefficients
    even = float(np.percentile(np.abs(values - surface), 90)) <= _UNEVEN
    return np.clip(terms @ coefficients, 0, 255).astype(np.float32), noise, even


def _energy(ink: Array, floor: float) -> float:
    return float(np.square(ink[ink > floor], dtype=np.float64).sum())


def _of_the_digit(solid: Mask, large: bool) -> Mask:
    """Where to keep ink: near every piece of ``solid`` that is no speck and not cut off by an edge."""
    pieces = Pieces.of(solid)
    chosen = pieces.areas >= max(_SPECK * pieces.areas.max(initial=0), 1)
    if large:
        top, bottom, left, right = pieces.boxes.T
        height, width = solid.shape
        cut = (top == 0).astype(int) + (left == 0) + (bottom == height) + (right == width)
        if (chosen & (cut == 0) & (bottom - top >= 0.05 * max(solid.shape))).any():
            # What one or two edges of the picture cut off is the table, a finger, or another line.
            chosen &= (cut == 0) | (cut > 2)
    wanted = pieces.mask(chosen)
    if not large and np.array_equal(wanted, solid):
        return np.ones_like(solid)
    # The soft edge of a stroke lies outside its solid part; it belongs to it.
    reach = max(1, round(0.04 * max(solid.shape)))
    return _grown(wanted, reach) & ~_grown(solid & ~wanted, 2)


def _grown(mask: Mask, reach: int) -> Mask:
    return _highest(mask.astype(np.float32), 2 * reach + 1) > 0


def _thicken(ink: Array) -> Array:
    """Widen strokes that are thinner than `_STROKE` of the ink's longer side."""
    longer = max(ink.shape)
    solid = ink > 127
    area = float(solid.sum())
    padded = np.pad(solid, 1)
    upright, across = padded[1:] != padded[:-1], padded[:, 1:] != padded[:, :-1]
    boundary = float(np.count_nonzero(upright) + np.count_nonzero(across))
    # A line of width w and length l has area w·l and, counted in pixel sides, a boundary of about 2·l·4/π.
    width = 2.0 * area / max(boundary * np.pi / 4, 1.0)
    lacking = round((_STROKE * longer - width) / 2)
    if lacking < 1:
        return ink
    canvas = Image.fromarray(np.pad(ink, lacking).astype(np.uint8))
    for _ in range(lacking):
        canvas = canvas.filter(ImageFilter.MaxFilter(3))
    return np.asarray(canvas, np.float32)


def _fit(ink: Array, height: float, width: float) -> Array:
    """Scale to the largest size that fits, keeping the proportions; ink that fits exactly is left alone."""
    scale = min(height / ink.shape[0], width / ink.shape[1])
    rows, columns = (max(1, round(side * scale)) for side in ink.shape)
    if (rows, columns) == ink.shape:
        return ink
    how = Image.Resampling.BOX if scale < 0.5 else Image.Resampling.BICUBIC
    resized = np.asarray(Image.fromarray(ink).resize((columns, rows), how), np.float32)
    # Averaging dims what is thinner than a pixel; the brightest ink is white again afterwards.
    full = max(float(np.percentile(resized, 98)), 96.0)
    return np.asarray(np.clip(resized * (255.0 / full), 0, 255), np.float32)


def framed(ink: Array, size: tuple[int, int], style: Style, box: float = BOX) -> npt.NDArray[np.uint8]:
    """Put the ink into a black frame: a digit by its centre of mass, an object by the middle of its sides.

    ``box``: the share of the frame that a digit fills.
    """
    if style == "digit":
        small = _fit(_thicken(ink), box * size[0], box * size[1])
        sums = small.sum(axis=1), small.sum(axis=0)
        centre = [float((each * np.arange(len(each))).sum()) / float(small.sum()) for each in sums]
    else:
        small = _fit(ink, *size)
        centre = [side / 2 for side in small.shape]
    frame = np.zeros(size, np.uint8)
    y, x = (  # rounded, and moved inwards if it would stick out
        min(max(round(room / 2 - middle), 0), room - side)
        for middle, room, side in zip(centre, size, small.shape, strict=True)
    )
    frame[y : y + small.shape[0], x : x + small.shape[1]] = np.rint(small)
    return frame
