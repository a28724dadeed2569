"""The suites that ``python benchmarks/run.py`` runs: one module each."""

from importlib import import_module
from typing import Any

from gammabeta.errors import UsageError

#: What each suite measures; a suite is the module of its name.
SUITES = {
    "kernels": "batch normalization layer by layer, against torch",
    "models": "a training step of whole networks, before and after conversion",
    "training": "the notebook's epoch, against other frameworks",
    "scaling": "time per image over data set and batch sizes, first and later starts",
    "profile": "where each millisecond of a training step goes",
    "inference": "the digit network served: evaluation mode, folded, ONNX Runtime",
    "doctor": "what recalibration and diagnosis cost beside a forward pass",
    "surgery": "convert, fold and recalibrate on models of other libraries: right or wrong, and how many",
    "gpu": "layers and networks on a GPU",
}


def load(name: str) -> Any:
    """The module of a suite. Only the one that runs is imported.

    Raises:
        UsageError: there is no such suite.
    """
    if name not in SUITES:
        raise UsageError(f"there is no benchmark {name!r}; choose one of {', '.join(SUITES)}")
    return import_module(f".{name}", __name__)
