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
    "pictures": "folders of pictures trained with no option, beside a plain loop",
    "doctor": "what recalibration and diagnosis cost beside a forward pass",
    "drawings": "digits drawn by a script in ten styles, and MNIST as photos: how they are read",
    "corpus": "what the doctor and the guard say of faults that other people reported",
    "guard": "faults noticed while one trains, false alarms, what the guard costs",
    "surgery": "convert, fold and recalibrate on models of other libraries: right or wrong, and how many",
    "healthy": "what the doctor says of healthy models, own ones and other libraries'; it should be silent",
    "masked": "a training step of padded batches, with a mask and without",
    "tune": "fine-tuning with frozen batch norm: kept memory and time of a step",
    "way_out": "batch norm replaced by group norm: accuracy before, after fitting, after distillation",
    "lab": "the lab in a browser: its start, a stroke, frames, memory, what it costs",
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
