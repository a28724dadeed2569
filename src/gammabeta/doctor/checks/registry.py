"""How a function becomes a check."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..evidence import Evidence
from ..finding import Finding

CheckFunction = Callable[[Evidence], Iterable[Finding]]


@dataclass(frozen=True)
class Check:
    """A public identifier, and the function that looks at the evidence."""

    identifier: str
    function: CheckFunction

    @property
    def doc(self) -> str:
        """The function's docstring: symptom, computation, threshold, fix, source."""
        return inspect.getdoc(self.function) or ""


REGISTERED: list[Check] = []


def check(function: CheckFunction) -> CheckFunction:
    """Register ``function`` as a check: ``dead_gamma`` gets the identifier "dead-gamma"."""
    REGISTERED.append(Check(function.__name__.replace("_", "-"), function))
    return function
