"""How a function becomes a check."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from ..evidence import Evidence, Layer
from ..finding import Finding

CheckFunction = Callable[[Evidence], Iterable[Finding]]
LayerFunction = Callable[[Layer, Evidence], Iterable[Finding]]


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
    """Register a check of the model as a whole: ``eval_mutates`` gets the identifier "eval-mutates"."""
    REGISTERED.append(Check(function.__name__.replace("_", "-"), function))
    return function


def check_layers(
    which: Callable[[Evidence], list[Layer]] = lambda evidence: evidence.layers,
) -> Callable[[LayerFunction], CheckFunction]:
    """Register a check of each layer in ``which(evidence)`` by itself; its findings are about that layer."""

    def register(function: LayerFunction) -> CheckFunction:
        @functools.wraps(function)
        def each_layer(evidence: Evidence) -> Iterator[Finding]:
            for layer in which(evidence):
                for finding in function(layer, evidence):
                    yield replace(finding, layer=layer.name)

        return check(each_layer)

    return register
