"""A trained network from its run folder or its ONNX file: ``load`` it, or ``predict`` with it at once."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import check_type
from .errors import UsageError

if TYPE_CHECKING:
    from .data.classify import Prediction
    from .data.onnxfile import OnnxClassifier
    from .train.load import Trained


def load(
    path: str | os.PathLike[str], device: str = "auto", *, best: bool = False
) -> "Trained | OnnxClassifier":
    """Open what ``gammabeta train`` or ``gammabeta export`` wrote, as ``gammabeta predict`` does.

    ``load(path).predict(...)`` takes a path, a PIL image, a uint8 array, or several of them, and gives a
    ``Prediction`` for each: label, probability, doubt and why, likeliest classes. Printing it gives a line.

    Args:
        path: a run folder; or an ONNX file, which needs no torch and runs on the CPU.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``, for a run folder.
        best: take the weights of a run's best epoch, not its last.

    Raises:
        RunError: it is no run folder, or a damaged one.
        WeightsError: its weights are missing, damaged, or do not fit.
        DataError: it is no ONNX file of ours.
        UnavailableError: onnxruntime is not installed.
    """
    check_type("load", "path", path, str | os.PathLike, "the path of a run folder or an ONNX file")
    if Path(path).suffix.lower() == ".onnx":
        from .data.onnxfile import OnnxClassifier

        return OnnxClassifier.open(path)
    from .train.load import load_model

    return load_model(Path(path), device, best=best)


def predict(
    run: "str | os.PathLike[str] | Trained | OnnxClassifier",
    pictures: Any,
    top: int = 1,
    *,
    best: bool = False,
    device: str = "auto",
) -> "Prediction | list[Prediction]":
    """Name the class of one picture, or of each of several; the answers are those of ``gammabeta predict``.

    Args:
        run: a run folder, an ONNX file, or what ``load`` gave; for many calls, load once.
        pictures: a path, a PIL image or a uint8 array (H, W), (H, W, C) or (C, H, W); or several of these,
            also as one array (N, C, H, W).
        top: how many classes to name for each picture.
        best: take the weights of a run's best epoch, not its last.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``, for a run folder.

    Returns:
        One ``Prediction`` for one picture, else a list.

    Raises:
        UsageError: ``run`` is none of these.
        DataError: a picture cannot be read, or nothing stands out on it.
        RunError, WeightsError, UnavailableError: as ``load``.
    """
    if isinstance(run, str | os.PathLike):
        run = load(run, device, best=best)
    if not hasattr(run, "classifier"):
        raise UsageError(f"predict: run is {type(run).__name__}; give a run folder or what load gave")
    return run.predict(pictures, top)
