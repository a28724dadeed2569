"""Bench 4: one image held fixed, its companions in the batch exchanged; in training its prediction moves."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...stats.preserve import preserved, set_modes
from ..subject import Subject
from .opened import packed

SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
_MATES = 23


@dataclass(frozen=True)
class Company:
    """Whose batch it is.

    Attributes:
        image: number of the fixed test image.
        size: images in the batch, the fixed one included.
        kind: companions from all classes, or all of one.
        digit: the class of the companions where they are of one.
    """

    image: int = 0
    size: int = 16
    kind: Literal["mixed", "one"] = "mixed"
    digit: int = 1


@dataclass(frozen=True)
class Spread:
    """The logit of the image's own class in each draw, in both modes; and the class it was given."""

    training: list[float]
    evaluation: list[float]
    answers: list[int]
    label: int

    @property
    def deviations(self) -> tuple[float, float]:
        """Standard deviation over the draws, in training and in evaluation (biased)."""
        both = (torch.tensor(v, dtype=torch.float64) for v in (self.training, self.evaluation))
        # The mean of equal numbers may miss them by a rounding; about the first one their deviation is 0.
        of_training, of_evaluation = (float((v - v[0]).std(correction=0)) for v in both)
        return of_training, of_evaluation


def draw(subject: Subject, company: Company, draws: int, seed: int) -> Spread:
    """Predict the fixed image with ``draws`` sets of companions, in both modes; the model stays as it is."""
    generator = torch.Generator().manual_seed(seed * 1000 + _MATES)
    pool = subject.by_class[company.digit] if company.kind == "one" else torch.arange(len(subject.test))
    pool = pool[pool != company.image]
    label = int(subject.test.labels[company.image])
    training: list[float] = []
    evaluation: list[float] = []
    answers: list[int] = []
    fixed = torch.tensor([company.image])
    with preserved(subject.model), torch.no_grad():
        batches = [
            subject.test.batch(torch.cat([fixed, pool[chosen]]))[0]
            for chosen in torch.randint(0, len(pool), (draws, company.size - 1), generator=generator)
        ]
        evaluation.extend(float(subject.model(x)[0, label]) for x in batches)
        set_modes(subject.model, training=True)  # from here on the running statistics change
        for x in batches:
            logits = subject.model(x)[0]
            training.append(float(logits[label]))
            answers.append(int(logits.argmax()))
    return Spread(training, evaluation, answers, label)


def sizes(subject: Subject, company: Company, draws: int, seed: int) -> Any:
    """The spread at each batch size, one after the other: yields ``(size, training, evaluation)``."""
    for size in SIZES:
        spread = draw(subject, Company(company.image, size, company.kind, company.digit), draws, seed)
        yield (size, *spread.deviations)


def picture(subject: Subject, image: int) -> dict[str, Any]:
    """The fixed image, for the page."""
    pixels: Tensor = torch.from_numpy(subject.dataset.test.images[image].astype("float32") / 255)
    return packed(pixels)
