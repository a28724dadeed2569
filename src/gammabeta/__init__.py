"""Batch normalization for PyTorch that is fast, correct and visible.

``import gammabeta as gb`` loads nothing heavy: each public name is imported at its first use, so that
``gammabeta --help`` answers at once and predicting from an ONNX file needs no torch.
"""

from typing import TYPE_CHECKING

from . import moved
from .lazy import importer

if TYPE_CHECKING:
    from . import data as data
    from . import errors as errors
    from . import functional as functional
    from . import nn as nn
    from . import reference as reference
    from . import train as train
    from .conversion.adapters import register_norm as register_norm
    from .conversion.convert import convert as convert
    from .doctor.diagnosis import diagnose as diagnose
    from .export import export_onnx as export_onnx
    from .folding import fold as fold
    from .stats.recalibrate import recalibrate as recalibrate
    from .train.fitting import fit as fit

__version__ = "0.1.0"

_MODULES = ("data", "errors", "functional", "nn", "reference", "train")
_NAMES: dict[str, str] = {
    "convert": ".conversion.convert",
    "export_onnx": ".export",
    "fit": ".train.fitting",
    "fold": ".folding",
    "diagnose": ".doctor.diagnosis",
    "register_norm": ".conversion.adapters",
    "recalibrate": ".stats.recalibrate",
}

__all__ = ["__version__", *_MODULES, *_NAMES]


moved.install()
__getattr__ = importer(__name__, _NAMES, _MODULES)


def __dir__() -> list[str]:
    return sorted(__all__)
