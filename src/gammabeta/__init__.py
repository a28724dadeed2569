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
    from .conversion.distil import distil as distil
    from .doctor.diagnosis import diagnose as diagnose
    from .export import export_onnx as export_onnx
    from .folding import fold as fold
    from .guard.watch import watch as watch
    from .loading import load as load
    from .loading import predict as predict
    from .measure.benchmark import benchmark as benchmark
    from .stats.adapt import adapt as adapt
    from .stats.domains import domains as domains
    from .stats.merge import local_statistics as local_statistics
    from .stats.merge import merge_statistics as merge_statistics
    from .stats.recalibrate import recalibrate as recalibrate
    from .stats.update_bn import update_bn as update_bn
    from .train.fitting import fit as fit
    from .train.judge import evaluate as evaluate

__version__ = "0.2.0"

_MODULES = ("data", "errors", "functional", "nn", "reference", "train")
_NAMES: dict[str, str] = {
    "adapt": ".stats.adapt",
    "benchmark": ".measure.benchmark",
    "convert": ".conversion.convert",
    "domains": ".stats.domains",
    "distil": ".conversion.distil",
    "export_onnx": ".export",
    "evaluate": ".train.judge",
    "fit": ".train.fitting",
    "fold": ".folding",
    "load": ".loading",
    "predict": ".loading",
    "diagnose": ".doctor.diagnosis",
    "register_norm": ".conversion.adapters",
    "local_statistics": ".stats.merge",
    "merge_statistics": ".stats.merge",
    "recalibrate": ".stats.recalibrate",
    "update_bn": ".stats.update_bn",
    "watch": ".guard.watch",
}

__all__ = ["__version__", *_MODULES, *_NAMES]


moved.install()
__getattr__ = importer(__name__, _NAMES, _MODULES)


def __dir__() -> list[str]:
    return sorted(__all__)
