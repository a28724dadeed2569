"""Benchmarks: correctness first, peers interleaved in one run, medians, the machine named.

A suite is a module with ``run(options) -> Result``. It checks its results before it times anything and raises
``IncorrectError`` if one is wrong, so that no figure of a wrong program is ever written.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import GammabetaError, UsageError

SUITES = {
    "gpu": ".gpu",
    "kernels": ".kernels",
}


class IncorrectError(GammabetaError):
    """A program under test gives a wrong result; it is not timed."""

    exit_code = 1


@dataclass(frozen=True)
class Options:
    """What a run is asked for."""

    quick: bool = False  # fewer cases and rounds: to see that it works, not to report
    out: Path = Path("benchmarks/results")


@dataclass
class Result:
    """What a suite found: rows of one table, and sentences about them."""

    title: str
    rows: list[dict[str, Any]]
    summary: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    chart: str | None = None  # the column to draw as bars, labelled by the row's "case"
    machine: str | None = None  # what computed, where that is not the CPU


def load(name: str) -> Callable[[Options], Result]:
    """The ``run`` of a suite.

    Raises:
        UsageError: there is no such suite.
    """
    if name not in SUITES:
        raise UsageError(f"there is no benchmark {name!r}; choose one of {', '.join(SUITES)}")
    run: Callable[[Options], Result] = import_module(SUITES[name], __name__).run
    return run
