"""A task of pictures that anyone can make again: circles, squares and triangles, drawn by a seed."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

CLASSES = ("circle", "square", "triangle")
_SIDES = (56, 104)  # pixels of a picture, drawn for height and width by themselves
_REACH = (0.15, 0.4)  # of the shorter side, from a shape's centre to its corners
_CONTRAST = 90.0  # between the shape's colour and the background's, as a distance in RGB
_FINER = 4  # times the picture's size in which it is drawn, for smooth edges


def write_shapes(folder: Path, each: int, seed: int = 0) -> Path:
    """Write ``each`` PNG pictures of each class into ``folder``, a folder per class; return ``folder``.

    Place, size, both colours, the slope of the background and the size of the picture are random.
    """
    random = np.random.RandomState(seed)  # its numbers are the same in every version of NumPy
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(each):
            draw_shape(name, random).save(folder / name / f"{number:04}.png")
    return folder


def draw_shape(name: str, random: np.random.RandomState) -> Image.Image:
    """Draw one picture of a class."""
    height, width = random.randint(_SIDES[0], _SIDES[1] + 1, 2)
    reach = random.uniform(*_REACH) * min(height, width)
    centre = np.array([random.uniform(reach, width - reach), random.uniform(reach, height - reach)])
    behind, colour = random.uniform(0, 255, (2, 3))
    while np.linalg.norm(behind - colour) < _CONTRAST:
        colour = random.uniform(0, 255, 3)
    slope = random.uniform(-30, 30, (2, 3))  # how far the background's colour drifts from side to side
    y, x = np.mgrid[0:height, 0:width]
    drift = (y / height)[..., None] * slope[0] + (x / width)[..., None] * slope[1]
    picture = Image.fromarray(np.clip(behind + drift, 0, 255).astype(np.uint8))
    mask = Image.new("L", (int(width) * _FINER, int(height) * _FINER))
    outline = [tuple(_FINER * point) for point in centre + reach * _outline(name)]
    ImageDraw.Draw(mask).polygon(outline, fill=255)
    mask = mask.resize(picture.size, Image.Resampling.BOX)
    picture.paste(tuple(int(value) for value in colour), mask=mask)
    return picture


def _outline(name: str) -> npt.NDArray[np.float64]:
    """The corners (N, 2) of a shape that stands upright about the origin, on the unit circle."""
    corners = {"circle": 64, "square": 4, "triangle": 3}[name]
    angles = np.pi / 2 + np.pi / corners + 2 * np.pi * np.arange(corners) / corners
    return np.stack([np.cos(angles), np.sin(angles)], 1)
