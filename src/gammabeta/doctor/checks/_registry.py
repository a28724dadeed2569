"""The checks by identifier, in the order in which they run."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..evidence import Evidence, Layer
from ..finding import Finding

CheckFunction = Callable[[Evidence], Iterable[Finding]]


@dataclass(frozen=True)
class Check:
    """A public identifier, and the function that looks at the evidence; its file's docstring explains it."""

    identifier: str
    function: CheckFunction

    @property
    def doc(self) -> str:
        """The text of the check's file: symptom, computation, threshold, fix, source."""
        return inspect.getdoc(sys.modules[self.function.__module__]) or ""


CHECKS: dict[str, Check] = {}


def check(*identifiers: str) -> Callable[[CheckFunction], CheckFunction]:
    """Register what follows under its public identifiers."""

    def register(function: CheckFunction) -> CheckFunction:
        for identifier in identifiers:
            CHECKS[identifier] = Check(identifier, function)
        return function

    return register


def updating(layers: Iterable[Layer]) -> Iterator[Layer]:
    """Layers that keep statistics of their own and are not held still by their owner."""
    for layer in layers:
        if layer.mean is not None and layer.var is not None and not layer.frozen:
            yield layer


def stored(layers: Iterable[Layer]) -> Iterator[Layer]:
    """Layers that keep statistics, frozen or not."""
    for layer in layers:
        if layer.mean is not None and layer.var is not None:
            yield layer
