"""What every suite shares: a result, the options of a run, timing, reports, the machine's name.

A suite is a module with ``run(options) -> Result`` and, if it has options of its own,
``add_options(parser)``. It checks its results before it times anything. If one is wrong it raises
``IncorrectError``, so no figure of a wrong program is ever written.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gammabeta.errors import GammabetaError

#: Where results go unless ``--out`` says otherwise.
RESULTS = Path(__file__).resolve().parents[1] / "results"


class IncorrectError(GammabetaError):
    """A program under test gives a wrong result; it is not timed."""

    exit_code = 1


@dataclass
class Result:
    """What a suite found: rows of one table, and sentences about them."""

    title: str
    rows: list[dict[str, Any]]
    summary: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    chart: str | None = None  # the column to draw as bars, labelled by the row's "case"
    machine: str | None = None  # what computed, where that is not the CPU
    draw: Callable[[Path], object] | None = None  # or the suite's own picture
    measured: list[dict[str, Any]] = field(default_factory=list)  # every single run, for the JSON
    part: str = ""  # of the suite, where a run is of one part: it has a file of its own


def _keep_nothing(_: Result) -> None:
    """Do not save."""


@dataclass(frozen=True)
class Options:
    """What a run is asked for, and how a long one saves what it has so far."""

    quick: bool = False  # fewer cases and rounds: to see that it works, not to report
    out: Path = RESULTS
    given: argparse.Namespace = field(default_factory=argparse.Namespace)  # the suite's own options
    save: Callable[[Result], object] = _keep_nothing  # writes a result that is not complete yet
