"""Digits drawn by a script, as people draw them, for judging how pictures are prepared and predicted.

A digit is a few strokes through points, one of several ways that people write it. Every drawing varies: its
points are moved, it is slanted, turned, stretched, and its pen presses unevenly. Then it is put on a page of
one of ten styles, from squared paper to a photograph with a shadow. Nothing of this is taken from MNIST or
from a font, and all of it follows from (style, digit, seed).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Plane = npt.NDArray[np.float64]
Random = np.random.Generator
Colour = tuple[float, float, float]

#: For each digit the ways of writing it. A way is strokes: "c" is a smooth curve through the points, "l" goes
#: straight from one to the next. x to the right, y down; the digit fills 0 to 1 in both.
_WAYS: dict[int, list[list[tuple[str, list[tuple[float, float]]]]]] = {
    0: [
        [("c", [(0.55, 0.02), (0.2, 0.12), (0.03, 0.5), (0.2, 0.9), (0.5, 0.99), (0.82, 0.87), (0.97, 0.5),
                (0.82, 0.12), (0.5, 0.01)])],
        [("c", [(0.7, 0.08), (0.4, 0.0), (0.1, 0.3), (0.08, 0.75), (0.4, 1.0), (0.8, 0.8), (0.92, 0.35),
                (0.72, 0.08), (0.55, 0.05)])],
    ],
    1: [
        [("l", [(0.5, 0.0), (0.5, 1.0)])],
        [("l", [(0.52, 0.0), (0.48, 0.5), (0.5, 1.0)])],
        [("l", [(0.2, 0.22), (0.52, 0.0), (0.52, 1.0)])],
    ],
    2: [
        [("c", [(0.08, 0.25), (0.25, 0.05), (0.55, 0.0), (0.85, 0.15), (0.85, 0.38), (0.6, 0.65), (0.3, 0.85),
                (0.03, 0.99)]), ("l", [(0.03, 0.99), (0.97, 0.96)])],
        [("c", [(0.08, 0.2), (0.4, 0.0), (0.82, 0.12), (0.8, 0.4), (0.5, 0.75), (0.2, 0.97), (0.04, 0.9),
                (0.18, 0.8), (0.5, 0.9), (0.97, 0.97)])],
    ],
    3: [
        [("c", [(0.08, 0.12), (0.4, 0.0), (0.82, 0.1), (0.8, 0.34), (0.4, 0.47)]),
         ("c", [(0.4, 0.47), (0.85, 0.58), (0.93, 0.8), (0.6, 1.0), (0.05, 0.9)])],
        [("l", [(0.1, 0.02), (0.85, 0.02), (0.42, 0.4)]),
         ("c", [(0.42, 0.4), (0.85, 0.52), (0.92, 0.78), (0.55, 1.0), (0.05, 0.9)])],
    ],
    4: [
        [("l", [(0.22, 0.02), (0.06, 0.55), (0.95, 0.52)]), ("l", [(0.76, 0.06), (0.7, 1.0)])],
        [("l", [(0.7, 1.0), (0.72, 0.0), (0.03, 0.64), (0.97, 0.64)])],
    ],
    5: [
        [("l", [(0.88, 0.02), (0.25, 0.03), (0.18, 0.43)]),
         ("c", [(0.18, 0.43), (0.5, 0.36), (0.88, 0.55), (0.85, 0.85), (0.5, 1.0), (0.05, 0.92)])],
        [("l", [(0.25, 0.05), (0.2, 0.45)]), ("l", [(0.27, 0.03), (0.92, 0.0)]),
         ("c", [(0.2, 0.45), (0.55, 0.38), (0.85, 0.6), (0.78, 0.88), (0.4, 1.0), (0.05, 0.9)])],
    ],
    6: [
        [("c", [(0.78, 0.02), (0.38, 0.2), (0.08, 0.6), (0.2, 0.93), (0.55, 1.0), (0.88, 0.82), (0.8, 0.57),
                (0.5, 0.5), (0.14, 0.7)])],
        [("c", [(0.55, 0.0), (0.22, 0.3), (0.08, 0.7), (0.35, 1.0), (0.8, 0.92), (0.88, 0.68), (0.55, 0.55),
                (0.15, 0.72)])],
    ],
    7: [
        [("l", [(0.05, 0.05), (0.95, 0.02), (0.42, 1.0)])],
        [("l", [(0.05, 0.05), (0.95, 0.02), (0.42, 1.0)]), ("l", [(0.32, 0.5), (0.88, 0.47)])],
        [("l", [(0.05, 0.06), (0.92, 0.03)]), ("c", [(0.92, 0.03), (0.62, 0.4), (0.48, 0.7), (0.44, 1.0)])],
    ],
    8: [
        [("c", [(0.78, 0.14), (0.48, 0.0), (0.17, 0.14), (0.25, 0.37), (0.65, 0.55), (0.9, 0.78), (0.55, 1.0),
                (0.13, 0.82), (0.3, 0.56), (0.68, 0.38), (0.84, 0.18), (0.7, 0.06)])],
        [("c", [(0.5, 0.0), (0.2, 0.12), (0.22, 0.36), (0.5, 0.46), (0.78, 0.36), (0.8, 0.12), (0.5, 0.0)]),
         ("c", [(0.5, 0.46), (0.12, 0.6), (0.1, 0.87), (0.5, 1.0), (0.9, 0.87), (0.88, 0.6), (0.5, 0.46)])],
    ],
    9: [
        [("c", [(0.86, 0.2), (0.5, 0.0), (0.12, 0.2), (0.22, 0.46), (0.6, 0.46), (0.88, 0.2)]),
         ("l", [(0.88, 0.12), (0.82, 1.0)])],
        [("c", [(0.86, 0.16), (0.5, 0.0), (0.12, 0.2), (0.25, 0.47), (0.65, 0.42), (0.88, 0.14)]),
         ("c", [(0.88, 0.14), (0.9, 0.5), (0.75, 0.88), (0.3, 1.0)])],
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Hand:
    """How somebody writes one digit: its sizes are shares of its height."""

    width: float
    slant: float
    turn: float  # radians
    thickness: float
    jitter: float

    @classmethod
    def drawn(cls, random: Random, thickness: tuple[float, float] = (0.06, 0.13)) -> "Hand":
        """Any hand, with strokes in this range."""
        return cls(
            random.uniform(0.5, 0.8),
            random.normal(0.1, 0.12),
            random.normal(0.0, 0.07),
            random.uniform(*thickness),
            random.uniform(0.005, 0.028),
        )


def strokes(digit: int, hand: Hand, random: Random) -> list[Plane]:
    """The digit as lines through many points (x, y), its height 1 and its middle at 0."""
    ways = _WAYS[digit]
    lines = []
    cosine, sine = np.cos(hand.turn), np.sin(hand.turn)
    width = 0.5 * hand.width if digit == 1 else hand.width
    for kind, points in ways[int(random.integers(len(ways)))]:
        at = np.array(points) + random.normal(0, hand.jitter, (len(points), 2))
        at = (_curve(at) if kind == "c" else _straight(at)) - 0.5
        x, y = width * at[:, 0] - hand.slant * at[:, 1], at[:, 1]
        lines.append(np.stack([cosine * x - sine * y, sine * x + cosine * y], 1))
    return lines


def _curve(points: Plane) -> Plane:
    """A Catmull-Rom spline through the points."""
    ends = np.concatenate([[2 * points[0] - points[1]], points, [2 * points[-1] - points[-2]]])
    t = np.linspace(0, 1, 14, endpoint=False)[:, np.newaxis]
    parts = []
    for a, b, c, d in zip(ends, ends[1:], ends[2:], ends[3:], strict=False):
        cubic = (3 * b - a - 3 * c + d) * t**3 + (2 * a - 5 * b + 4 * c - d) * t**2 + (c - a) * t + 2 * b
        parts.append(cubic / 2)
    return np.concatenate([*parts, points[-1:]])


def _straight(points: Plane) -> Plane:
    t = np.linspace(0, 1, 14, endpoint=False)[:, np.newaxis]
    parts = [a + (b - a) * t for a, b in pairwise(points)]
    return np.concatenate([*parts, points[-1:]])


def ink(
    digit: int, hand: Hand, size: tuple[int, int], box: tuple[float, float, float], random: Random
) -> Plane:
    """Ink (H, W) from 0 to 1 on a page of (width, height).

    ``box``: the middle of the digit (x, y) and its height, in pixels.
    """
    fine = 2 if max(size) > 100 else 4
    page = Image.new("L", (size[0] * fine, size[1] * fine), 0)
    draw = ImageDraw.Draw(page)
    x, y, height = (fine * value for value in box)
    for line in strokes(digit, hand, random):
        at = line * height + (x, y)
        steps = np.linspace(0, 1, len(at))
        phase, beats = random.uniform(0, 6.3), random.uniform(0.5, 2)
        radii = 0.5 * hand.thickness * height * (1 + 0.15 * np.sin(phase + 6.3 * beats * steps))
        for (x0, y0), (x1, y1), r in zip(at, at[1:], radii, strict=False):
            for share in np.arange(0, 1, max(0.1, 0.3 * r / max(np.hypot(x1 - x0, y1 - y0), 1e-9))):
                px, py = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
                draw.ellipse((px - r, py - r, px + r, py + r), fill=255)
    return np.asarray(page.resize(size, Image.Resampling.BOX), np.float64) / 255


def _paper(size: tuple[int, int], colour: Colour, random: Random, noise: float = 2.0) -> Plane:
    """A page (H, W, 3) of a colour, with the grain of paper and camera."""
    width, height = size
    grain = random.normal(0, noise, (height, width, 1)) + random.normal(0, noise / 3, (height, width, 3))
    return np.array(colour) + grain


def _over(page: Plane, amount: Plane, colour: Colour) -> Plane:
    """Lay ink of a colour over a page, ``amount`` (H, W) from 0 to 1 of it."""
    return page * (1 - amount[..., np.newaxis]) + np.array(colour) * amount[..., np.newaxis]


def _lines(size: tuple[int, int], along: str, positions: Plane, width: float, tilt: float) -> Plane:
    """Straight lines across a page, as ink (H, W); ``tilt`` is their slope."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]].astype(np.float64)
    at = y + tilt * x if along == "x" else x - tilt * y
    found = np.zeros_like(at)
    for position in positions:
        found = np.maximum(found, np.clip(0.5 + width / 2 - np.abs(at - position), 0, 1))
    return found


def _blurred(plane: Plane, radius: float) -> Plane:
    """Blur a plane of values from 0 to 1."""
    picture = Image.fromarray(np.clip(plane * 255, 0, 255).astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)), np.float64) / 255


def _middle(size: tuple[int, int], random: Random, low: float, high: float) -> tuple[float, float, float]:
    """A digit of ``low`` to ``high`` of the page's shorter side, somewhere near the middle."""
    width, height = size
    tall = min(size) * random.uniform(low, high)
    return (
        width / 2 + random.uniform(-0.08, 0.08) * width,
        height / 2 + random.uniform(-0.08, 0.08) * height,
        tall,
    )


def _size(random: Random, low: int = 240, high: int = 520) -> tuple[int, int]:
    longer = int(random.integers(low, high))
    shorter = int(longer * random.uniform(0.7, 1))
    return (longer, shorter) if random.random() < 0.5 else (shorter, longer)


_PENS: list[Colour] = [(25, 25, 30), (20, 35, 110), (40, 40, 140), (10, 10, 10), (60, 30, 30)]
_RULINGS: list[Colour] = [(80, 110, 190), (120, 120, 125), (130, 80, 160), (70, 90, 140), (80, 150, 150)]
_PENCIL: Colour = (95, 95, 100)


def _ruling(random: Random) -> tuple[Colour, float]:
    """The colour of printed lines, and how strongly they are printed."""
    return _RULINGS[int(random.integers(len(_RULINGS)))], random.uniform(0.25, 0.95)


def _pen(random: Random) -> Colour:
    return _PENS[int(random.integers(len(_PENS)))]


def squared(digit: int, random: Random) -> Plane:
    """On squared paper, two to seven squares a digit; a third of them in pencil, no darker than the grid."""
    size = _size(random)
    box = _middle(size, random, 0.45, 0.75)
    pitch, tilt, width = box[2] / random.uniform(2, 7), random.normal(0, 0.012), random.uniform(1, 2.6)
    page = _paper(size, (random.uniform(225, 250),) * 3, random)
    ruling, strength = _ruling(random)
    for along, side in (("x", size[1]), ("y", size[0])):
        at = np.arange(random.uniform(0, pitch) - pitch, side + pitch, pitch)
        page = _over(page, strength * _lines(size, along, at, width, tilt), ruling)
    pen = _PENCIL if random.random() < 1 / 3 else _pen(random)
    return _over(page, 0.9 * ink(digit, Hand.drawn(random), size, box, random), pen)


def ruled(digit: int, random: Random) -> Plane:
    """On ruled paper, now and then with a red margin: the digit stands on a line or across several."""
    size = _size(random)
    box = _middle(size, random, 0.4, 0.75)
    pitch, tilt = box[2] / random.uniform(0.8, 3), random.normal(0, 0.012)
    page = _paper(
        size, (random.uniform(235, 252), random.uniform(235, 250), random.uniform(215, 245)), random
    )
    at = np.arange(box[1] + box[2] / 2 - 9 * pitch, size[1] + pitch, pitch)
    ruling, strength = _ruling(random)
    page = _over(page, strength * _lines(size, "x", at, random.uniform(1, 2.6), tilt), ruling)
    if random.random() < 0.4:
        margin = np.array([size[0] * random.uniform(0.04, 0.12)])
        page = _over(page, _lines(size, "y", margin, random.uniform(1, 2.2), tilt), (215, 110, 115))
    return _over(page, 0.95 * ink(digit, Hand.drawn(random), size, box, random), _pen(random))


def pencil(digit: int, random: Random) -> Plane:
    """Thin, grey, and broken up by the grain of the paper."""
    size = _size(random)
    drawn = ink(digit, Hand.drawn(random, (0.03, 0.07)), size, _middle(size, random, 0.45, 0.8), random)
    grain = _blurred(random.uniform(0, 1, drawn.shape), 0.8)
    texture = np.clip(0.75 + 1.6 * (grain - 0.5), 0.15, 1)
    page = _paper(size, (random.uniform(225, 250),) * 3, random, 3.0)
    return _over(page, drawn * texture * random.uniform(0.55, 0.9), (85, 85, 90))


def marker(digit: int, random: Random) -> Plane:
    """A broad coloured felt pen, paler in the middle of its stroke."""
    size = _size(random)
    drawn = ink(digit, Hand.drawn(random, (0.12, 0.19)), size, _middle(size, random, 0.5, 0.85), random)
    inner = _blurred((drawn > 0.5).astype(np.float64), 0.012 * max(size))
    colour = [(200, 30, 40), (20, 90, 180), (20, 130, 60), (30, 30, 30), (120, 40, 150)][random.integers(5)]
    page = _paper(size, (random.uniform(235, 253),) * 3, random)
    return _over(page, drawn * (0.95 - 0.25 * inner), colour)


def photo(digit: int, random: Random) -> Plane:
    """Paper in a camera: light from one side, the shadow of a hand, noise, a little out of focus."""
    size = _size(random, 360, 640)
    drawn = ink(digit, Hand.drawn(random), size, _middle(size, random, 0.35, 0.65), random)
    page = _over(_paper(size, (215, 208, 195), random, 0.5), 0.9 * drawn, _pen(random))
    y, x = np.mgrid[-1 : 1 : size[1] * 1j, -1 : 1 : size[0] * 1j]
    angle = random.uniform(0, 6.3)
    across = np.cos(angle) * x + np.sin(angle) * y
    light = 0.85 + random.uniform(0.05, 0.2) * across - random.uniform(0, 0.12) * (x * x + y * y)
    angle = random.uniform(0, 6.3)
    edge = np.cos(angle) * x + np.sin(angle) * y + 0.15 * np.sin(3 * x + 5 * random.random())
    softness = random.uniform(0.015, 0.2)
    shadow = 1 / (1 + np.exp(-(edge - random.uniform(-0.3, 0.5)) / softness))
    light = light * (1 - random.uniform(0.25, 0.65) * shadow)
    seen = page * light[..., np.newaxis] + random.normal(0, random.uniform(2, 6), page.shape)
    blurred = Image.fromarray(np.clip(seen, 0, 255).astype(np.uint8)).filter(
        ImageFilter.GaussianBlur(random.uniform(0.3, 1.5))
    )
    return np.asarray(blurred, np.float64)


def inverted(digit: int, random: Random) -> Plane:
    """Chalk on a board, or light ink on black."""
    size = _size(random)
    drawn = ink(digit, Hand.drawn(random, (0.06, 0.14)), size, _middle(size, random, 0.45, 0.8), random)
    board: list[Colour] = [(30, 55, 45), (25, 25, 28), (5, 5, 5), (40, 45, 60)]
    page = _paper(size, board[int(random.integers(4))], random)
    if random.random() < 0.6:
        dust = _blurred(_blurred(random.uniform(0, 1, drawn.shape), 2) > 0.5, 0.05 * max(size))
        page = page + 40 * (dust - dust.min())[..., np.newaxis]
        drawn = drawn * np.clip(0.85 + 0.8 * (_blurred(random.uniform(0, 1, drawn.shape), 0.8) - 0.5), 0, 1)
    return _over(page, 0.95 * drawn, (240, 240, 235))


def framed(digit: int, random: Random) -> Plane:
    """In a box drawn around it, by hand or by ruler; one in four in the middle field of a form's row."""
    size = _size(random)
    box = _middle(size, random, 0.35, 0.6)
    hand = Hand.drawn(random)
    pen = _pen(random)
    page = _paper(size, (random.uniform(230, 252),) * 3, random)
    frame = Image.new("L", size, 0)
    draw = ImageDraw.Draw(frame)
    half = box[2] * np.array([random.uniform(0.62, 0.75), random.uniform(0.62, 0.8)])
    width = max(1, round(box[2] * random.uniform(0.012, 0.06)))
    wobble = 0.02 * box[2] * (random.random() < 0.5)
    corners = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    at = [tuple(np.array(box[:2]) + half * corner + random.normal(0, wobble + 1e-9, 2)) for corner in corners]
    draw.line([*at, at[0], at[1]], fill=255, width=width, joint="curve")
    if random.random() < 0.25:
        (left, top), (right, bottom) = box[:2] - half, box[:2] + half
        for side in (-2 * half[0], 2 * half[0]):
            draw.rectangle((left + side, top, right + side, bottom), outline=255, width=width)
    page = _over(page, 0.95 * np.asarray(frame, np.float64) / 255, pen)
    return _over(page, 0.95 * ink(digit, hand, size, box, random), pen)


def off_centre(digit: int, random: Random) -> Plane:
    """In a corner of a large page."""
    size = _size(random, 360, 640)
    tall = min(size) * random.uniform(0.2, 0.35)
    x, y = (
        random.choice([random.uniform(0.65, 0.8), side / tall - random.uniform(0.65, 0.8)]) * tall
        for side in size
    )
    page = _paper(size, (random.uniform(230, 252),) * 3, random)
    return _over(page, 0.95 * ink(digit, Hand.drawn(random), size, (x, y, tall), random), _pen(random))


def small(digit: int, random: Random) -> Plane:
    """A picture of few pixels, or a large page with a digit of few pixels."""
    if random.random() < 0.5:
        size = _size(random, 26, 60)
        box = _middle(size, random, 0.6, 0.8)
        hand = Hand.drawn(random, (0.08, 0.14))
    else:
        size = _size(random, 360, 600)
        box = _middle(size, random, 0.08, 0.16)
        hand = Hand.drawn(random, (0.07, 0.13))
    page = _paper(size, (random.uniform(230, 252),) * 3, random, 1.0)
    return _over(page, 0.95 * ink(digit, hand, size, box, random), _pen(random))


def thick(digit: int, random: Random) -> Plane:
    """Strokes of a fifth to a quarter of the digit's height: a brush, or a finger on glass."""
    size = _size(random)
    drawn = ink(digit, Hand.drawn(random, (0.18, 0.24)), size, _middle(size, random, 0.5, 0.75), random)
    page = _paper(size, (random.uniform(235, 253),) * 3, random)
    return _over(page, 0.95 * drawn, _pen(random))


STYLES: dict[str, Callable[[int, Random], Plane]] = {
    "squared": squared,
    "ruled": ruled,
    "pencil": pencil,
    "marker": marker,
    "photo": photo,
    "inverted": inverted,
    "framed": framed,
    "off-centre": off_centre,
    "small": small,
    "thick": thick,
}


def drawing(style: str, digit: int, seed: int) -> tuple[str, bytes]:
    """A drawing as a file: its suffix and its content; photographs and some others are JPEG."""
    random = np.random.default_rng([seed, digit, list(STYLES).index(style)])
    picture = Image.fromarray(np.clip(STYLES[style](digit, random), 0, 255).astype(np.uint8))
    jpeg = style == "photo" or random.random() < 0.3
    buffer = BytesIO()
    picture.save(buffer, **({"format": "JPEG", "quality": 80} if jpeg else {"format": "PNG"}))
    return (".jpg" if jpeg else ".png"), buffer.getvalue()


def drawings(style: str, count: int, first_seed: int) -> Iterator[tuple[int, str, bytes]]:
    """``count`` drawings of each digit in a style: digit, suffix and content."""
    for seed in range(first_seed, first_seed + count):
        for digit in range(10):
            yield digit, *drawing(style, digit, seed)
