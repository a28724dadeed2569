"""Benchmarks: correctness first, peers interleaved in one run, medians, the machine named.

A suite is a module with ``run(options) -> Result`` and, if it has options of its own,
``add_options(parser)``. It checks its results before it times anything and raises
``IncorrectError`` if one is wrong, so that no figure of a wrong program is ever written.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from gammabeta.errors import GammabetaError, UsageError

#: What each suite measures; a suite is the module of its name.
SUITES = {
    "kernels": "batch normalization layer by layer, against torch",
    "models": "a training step of whole networks, before and after conversion",
    "training": "the notebook's epoch, against other frameworks",
    "scaling": "time per image over data set and batch sizes, first and later starts",
    "profile": "where each millisecond of a training step goes",
    "inference": "the digit network served: evaluation mode, folded, ONNX Runtime",
    "doctor": "faults put into models: how many the doctor finds",
    "gpu": "layers and networks on a GPU",
}

#: The folder ``benchmarks`` of the checkout that this package runs from; an installed package has none there.
CHECKOUT = Path(__file__).resolve().parents[3] / "benchmarks"


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


def _keep_nothing(_: Result) -> None:
    """Do not save."""


@dataclass(frozen=True)
class Options:
    """What a run is asked for, and where a long one puts down what it has so far."""

    quick: bool = False  # fewer cases and rounds: to see that it works, not to report
    out: Path = Path("benchmarks/results")
    given: argparse.Namespace = field(default_factory=argparse.Namespace)  # the suite's own options
    save: Callable[[Result], object] = _keep_nothing  # writes a result that is not complete yet


def load(name: str) -> Any:
    """The module of a suite.

    Raises:
        UsageError: there is no such suite.
    """
    if name not in SUITES:
        raise UsageError(f"there is no benchmark {name!r}; choose one of {', '.join(SUITES)}")
    return import_module(f".{name}", __name__)
