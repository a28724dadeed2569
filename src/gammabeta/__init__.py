"""Batch normalization for PyTorch that is fast, correct and visible.

``import gammabeta as gb`` loads nothing heavy: each public name is imported at its first use, so that
``gammabeta --help`` answers at once and predicting from an ONNX file needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import data as data
    from . import errors as errors
    from . import functional as functional
    from . import nn as nn
    from . import reference as reference
    from . import train as train
    from .surgery.recalibrate import recalibrate as recalibrate

__version__ = "0.1.0"

_MODULES = ("data", "errors", "functional", "nn", "reference", "train")
_NAMES: dict[str, str] = {
    "recalibrate": ".surgery.recalibrate",
}

__all__ = ["__version__", *_MODULES, *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name in _NAMES:
        value = getattr(import_module(_NAMES[name], __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'gammabeta' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
