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


def find_ink(grey: Array) -> Array | None:
    """Separate ink, dark or light, from the background of ``grey`` (H, W), 0 to 255.

    Returns:
        (h, w), cropped to the ink: 0 where there is none, about 255 where it is full; None for a blank
        picture.
    """
    background, noise = _background(grey)
    difference = grey - background
    floor = max(4.0 * noise, 2.0)  # below this a difference means nothing
    light, dark = np.maximum(difference, 0), np.maximum(-difference, 0)
    ink = light if _energy(light, floor) >= _energy(dark, floor) else dark
    if np.count_nonzero(ink > floor) == 0 or ink.max() < 16:
        return None
    full = float(np.percentile(ink[ink > ink.max() / 2], 75))
    full = 255.0 if full > 235 else full  # full contrast already: leave every pixel as it is
    if noise > 0.5:
        # A photograph or JPEG: its noise and shadows must not become grey haze around the digit.
        low = max(floor, 0.2 * full)
        ink = (ink - low) * (full / max(full - low, 1.0))
    ink = np.clip(ink * (255.0 / full), 0, 255)
    kept = ink * _without_specks(ink > 96)
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


def _background(grey: Array) -> tuple[Array, float]:
    """The paper: a quadratic surface through the rim, and the noise (standard deviation) about it.

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
        coefficients = np.linalg.lstsq(at[near], values[near], rcond=None)[0].astype(np.float32)
        surface = at @ coefficients
    return np.clip(terms @ coefficients, 0, 255).astype(np.float32), noise


def _energy(ink: Array, floor: float) -> float:
    return float(np.square(ink[ink > floor], dtype=np.float64).sum())


def _without_specks(solid: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Where to keep ink: near every piece of ``solid`` that is not a speck beside the largest piece."""
    labels = _pieces(solid)
    areas = np.bincount(labels.reshape(-1))
    areas[0] = 0
    large = areas >= max(_SPECK * areas.max(), 1)
    if np.array_equal(large[1:], areas[1:] > 0):
        return np.ones_like(solid)
    keep = Image.fromarray(large[labels] * np.uint8(255))
    # The soft edge of a stroke lies outside its solid part; it belongs to it.
    reach = 2 * max(1, round(0.02 * max(solid.shape))) + 1
    return np.asarray(keep.filter(ImageFilter.MaxFilter(reach))) > 0


def _pieces(solid: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Number the pieces of ``solid`` that touch by sides or corners from 1; 0 elsewhere."""
    runs, parent = _runs(solid), [0]
    labels = np.zeros(solid.shape, np.int64)
    above: list[tuple[int, int, int]] = []
    for row, line in enumerate(runs):
        here = []
        for start, stop in line:
            touching = [label for first, last, label in above if first <= stop and last >= start]
            roots = {_root(parent, label) for label in touching}
            if roots:
                label = min(roots)
                for root in roots:
                    parent[root] = label
            else:
                label = len(parent)
                parent.append(label)
            labels[row, start:stop] = label
            here.append((start, stop, label))
        above = here
    return np.array([_root(parent, label) for label in range(len(parent))])[labels]


def _runs(solid: npt.NDArray[np.bool_]) -> list[list[tuple[int, int]]]:
    """For each row, (start, stop) of every unbroken run."""
    padded = np.zeros((solid.shape[0], solid.shape[1] + 2), np.int8)
    padded[:, 1:-1] = solid
    lines: list[list[tuple[int, int]]] = [[] for _ in range(len(solid))]
    changes = np.diff(padded, axis=1)
    starts, stops = np.argwhere(changes == 1), np.argwhere(changes == -1)
    for (row, start), (_, stop) in zip(starts.tolist(), stops.tolist(), strict=True):
        lines[row].append((start, stop))
    return lines


def _root(parent: list[int], label: int) -> int:
    while parent[label] != label:
        parent[label] = parent[parent[label]]
        label = parent[label]
    return label


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
