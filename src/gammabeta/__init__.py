"""Batch normalization for PyTorch that is fast, correct and visible.

``import gammabeta as gb`` loads nothing heavy: each public name is imported at its first use, so that
``gammabeta --help`` answers at once and predicting from an ONNX file needs no torch.
"""

from typing import TYPE_CHECKING

from .lazy import importer

if TYPE_CHECKING:
    from . import data as data
    from . import errors as errors
    from . import functional as functional
    from . import nn as nn
    from . import reference as reference
    from . import train as train
    from .doctor.diagnosis import diagnose as diagnose
    from .surgery.convert import convert as convert
    from .surgery.export import export_onnx as export_onnx
    from .surgery.fold import fold as fold
    from .surgery.recalibrate import recalibrate as recalibrate
    from .train.fitting import fit as fit

__version__ = "0.1.0"

_MODULES = ("data", "errors", "functional", "nn", "reference", "train")
_NAMES: dict[str, str] = {
    "convert": ".surgery.convert",
    "export_onnx": ".surgery.export",
    "fit": ".train.fitting",
    "fold": ".surgery.fold",
    "diagnose": ".doctor.diagnosis",
    "recalibrate": ".surgery.recalibrate",
}

__all__ = ["__version__", *_MODULES, *_NAMES]


__getattr__ = importer(__name__, _NAMES, _MODULES)


def __dir__() -> list[str]:
    return sorted(__all__)
