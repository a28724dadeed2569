"""``load``: a trained network from its run folder or its ONNX file, ready to predict."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    if Path(path).suffix.lower() == ".onnx":
        from .data.onnxfile import OnnxClassifier

        return OnnxClassifier.open(path)
    from .train.load import load_model

    return load_model(Path(path), device, best=best)
