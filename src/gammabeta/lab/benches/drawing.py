"""Bench 1: a drawing becomes a picture, the picture an answer, and each layer shows what it made of it."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import torch
from PIL import Image, ImageDraw

from ...data.classify import Prediction
from ..subject import Subject
from .opened import packed, walk

SIDE = 224  # pixels of the paper
PEN = 0.075  # of the paper's side

Stroke = Sequence[tuple[float, float]]


def on_paper(strokes: Sequence[Stroke]) -> Image.Image:
    """Strokes, lists of points (x, y) in [0, 1] from the top left, as light ink on dark, 224×224 pixels."""
    paper = Image.new("L", (SIDE, SIDE), 0)
    pen, width = ImageDraw.Draw(paper), round(PEN * SIDE)
    radius = width / 2
    for stroke in strokes:
        points = [(x * SIDE, y * SIDE) for x, y in stroke]
        if len(points) > 1:
            pen.line(points, fill=255, width=width, joint="curve")
        for x, y in (points[0], points[-1]):  # round ends; a tap is a dot
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return paper


def answer(subject: Subject, picture: Image.Image) -> dict[str, Any]:
    """Name the digit on a picture, and show each layer before and after batch norm and activation.

    Raises:
        DataError: Nothing stands out on the picture.
    """
    file = BytesIO()
    picture.save(file, "PNG")
    prediction = subject.classifier.predict(file, top=len(subject.dataset.classes))
    assert isinstance(prediction, Prediction)
    with torch.no_grad():
        sites, _ = walk(subject.model, subject.scaled(prediction.prepared[None]))
    shares = dict(prediction.top)
    return {
        "label": prediction.label,
        "probability": prediction.probability,
        "doubt": prediction.why,
        "shares": [[name, shares[name]] for name in subject.dataset.classes],
        "seen": prediction.prepared[0].tolist(),
        "layers": [
            {
                "name": site.name,
                "stages": [packed(as_maps(value[0])) for value in (site.before, site.after, site.activated)],
            }
            for site in sites
        ],
    }


def sample(subject: Subject, digit: int, number: int) -> Image.Image:
    """One of the test images of a class, as a picture."""
    of_class = subject.by_class[digit % len(subject.by_class)]
    index = int(of_class[number % len(of_class)])
    return Image.fromarray(subject.dataset.test.images[index, 0])


def as_maps(values: torch.Tensor) -> torch.Tensor:
    """Channels as maps ``(C, H, W)``; of a linear layer one map of one row."""
    return (
        values
        if values.dim() == 3
        else values.reshape(1, 2, -1)
        if len(values) % 2 == 0
        else values[None, None]
    )
