"""What a study is: a claim, what would show it, how it is measured; and the verdict on what was measured."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from matplotlib.figure import Figure

from .trial import Trial

Numbers = Mapping[str, float]
Verdict = Literal["reproduced", "partly", "not reproduced"]

#: Student's t, two-sided 95 %, for 1, 2, … degrees of freedom; beyond them the normal distribution's.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)


@dataclass(frozen=True)
class Measured:
    """What one seed gave: ``numbers`` by name, which the criteria judge, and ``curves`` for the picture."""

    numbers: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)


class Criterion(NamedTuple):
    """A sentence that is true or not of one seed's numbers, and the same as code."""

    says: str
    holds: Callable[[Numbers], bool]


class Spread(NamedTuple):
    """A number over the seeds: mean, standard deviation (n − 1), half of the 95 % interval (Student's t)."""

    mean: float
    deviation: float
    half_width: float


@dataclass(frozen=True)
class Study:
    """A claim of a paper, and all that it takes to see whether it holds here.

    Attributes:
        name: as the command takes it.
        title: a few words.
        claim: what is claimed, in one sentence of ours.
        paper: authors, year and title.
        where: section, figure or table.
        tool: which of our functions the study puts to work.
        method: what is done, in a few sentences.
        differs: what differs from the paper's setting.
        criteria: what must hold for *reproduced*, written before the first run; the first is the claim.
        numbers: each number's label, with its unit; the order is that of the table.
        setting: sizes of a run; a frozen dataclass.
        quick: the same for a run that only shows that everything works.
        run: measures with one seed.
        draw: draws all seeds' results.
        data: "digits", "clothing", or "" for a study without images.
        changed: what of the criteria or the measurement was changed after a first run, and why.
        believed: why it is not reproduced, where it is not; what we believe, as no run shows it.
    """

    name: str
    title: str
    claim: str
    paper: str
    where: str
    tool: str
    method: str
    differs: str
    criteria: tuple[Criterion, ...]
    numbers: dict[str, str]
    setting: Any
    quick: Any
    run: Callable[[Any, Trial], Measured]
    draw: Callable[[Figure, "Results"], None]
    data: str = "digits"
    changed: str = ""
    believed: str = ""


class Results:
    """What all seeds gave, as pictures and verdicts want it."""

    def __init__(self, seeds: Sequence[Measured]) -> None:
        self.seeds = list(seeds)

    def values(self, name: str) -> list[float]:
        """One number of every seed."""
        return [seed.numbers[name] for seed in self.seeds]

    def spread(self, name: str) -> Spread:
        """One number's mean over the seeds, and how far it varies; NaN where one seed is not enough."""
        values = self.values(name)
        mean = sum(values) / len(values)
        if len(values) < 2 or not all(map(math.isfinite, values)):
            return Spread(mean, math.nan, math.nan)
        deviation = statistics.stdev(values)
        t = _T[len(values) - 2] if len(values) - 2 < len(_T) else 1.96
        return Spread(mean, deviation, t * deviation / math.sqrt(len(values)))

    def curve(self, name: str) -> tuple[list[float], list[float], list[float]]:
        """One curve's mean, least and greatest value over the seeds at each point."""
        points = list(zip(*(seed.curves[name] for seed in self.seeds), strict=True))
        return [sum(p) / len(p) for p in points], [min(p) for p in points], [max(p) for p in points]

    def means(self) -> dict[str, float]:
        """The mean of every number."""
        return {name: self.spread(name).mean for name in self.seeds[0].numbers}


@dataclass(frozen=True)
class Judged:
    """One criterion: whether it holds of the mean, and of how many seeds."""

    says: str
    mean: bool
    seeds: int
    of: int

    @property
    def holds(self) -> bool:
        """It does of the mean and of more than half of the seeds."""
        return self.mean and 2 * self.seeds > self.of


def judge(criteria: Sequence[Criterion], results: Results) -> tuple[Verdict, list[Judged]]:
    """Return the verdict, and what became of each criterion.

    All hold: reproduced. The first does, or at least half of them: partly. Else: not reproduced.
    """
    judged = [
        Judged(
            criterion.says,
            _holds(criterion, results.means()),
            sum(_holds(criterion, seed.numbers) for seed in results.seeds),
            len(results.seeds),
        )
        for criterion in criteria
    ]
    held = [each.holds for each in judged]
    if all(held):
        return "reproduced", judged
    return ("partly" if held[0] or 2 * sum(held) >= len(held) else "not reproduced"), judged


def _holds(criterion: Criterion, numbers: Numbers) -> bool:
    """A comparison with NaN is False: what could not be measured shows nothing."""
    return bool(criterion.holds(numbers))
