"""Classify pictures with an ONNX file that ``gammabeta export`` wrote: NumPy and ONNX Runtime, no torch."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError, UnavailableError, installing
from ..text import storable
from .classify import Classifier, Prediction
from .picture import Style
from .preparation import Preparation, earlier, preparation_of
from .stream import reason

METADATA = "gammabeta"  # the metadata entry that holds our JSON; the export writes it
_BATCH, _PIXELS = 256, 256 * 32 * 32  # images and their pixels per run: bounds the memory


@dataclass(frozen=True)
class OnnxClassifier:
    """An ONNX model of one picture input and one output of logits, with what it says of itself.

    ``mean`` and ``scale``: ``(pixel - mean) * scale`` per channel, float32 (C, 1, 1), pixels 0 to 255.
    """

    path: Path
    session: Any
    classes: tuple[str, ...]
    channels: int
    size: tuple[int, int]
    mean: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]
    style: Style | None
    preparation: Preparation
    temperature: float = 1.0

    @classmethod
    def open(cls, path: str | os.PathLike[str], threads: int | None = None) -> "OnnxClassifier":
        """Load a file into ONNX Runtime on the CPU.

        Raises:
            UnavailableError: onnxruntime is not installed.
            DataError: the file is missing or no ONNX model, or says nothing of its classes and input.
        """
        try:
            import onnxruntime
        except ImportError:
            raise UnavailableError(
                f"onnxruntime is not installed, and an ONNX file needs it: {installing('onnx')}"
            ) from None
        file = Path(path)
        if not file.is_file():
            raise DataError(f"there is no file {file}")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            # It takes names in UTF-8 only.
            model = file if storable(str(file)) == str(file) else file.read_bytes()
            session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exception classes share no public base
            why = reason(error)[:200]
            raise DataError(f"{file} is not an ONNX model that ONNX Runtime can load: {why}") from None
        return cls(file, session, **_described(file, session))

    @property
    def classifier(self) -> Classifier:
        """The network as one that answers for pictures."""
        return Classifier(self.classes, self.preparation, self.probabilities, self.temperature)

    def predict(self, pictures: Any, top: int = 1) -> "Prediction | list[Prediction]":
        """Name the class of one picture or of several: see `Classifier.predict`."""
        return self.classifier.predict(pictures, top)

    def logits(self, pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Logits float32 (N, classes) of uint8 pictures (N, C, H, W)."""
        wanted = (self.channels, *self.size)
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[1:] != wanted:
            raise DataError(
                f"{self.path} takes uint8 pictures of {wanted}, not {pictures.dtype} {pictures.shape}"
            )
        name = self.session.get_inputs()[0].name
        if not len(pictures):
            return np.empty((0, len(self.classes)), np.float32)
        batch = max(1, min(_BATCH, _PIXELS // (self.size[0] * self.size[1])))
        batches = (pictures[i : i + batch] for i in range(0, len(pictures), batch))
        parts = [self.session.run(None, {name: (part - self.mean) * self.scale})[0] for part in batches]
        found: npt.NDArray[np.float32] = np.concatenate(parts)
        return found

    def probabilities(self, pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Class probabilities float32 (N, classes) of uint8 pictures (N, C, H, W)."""
        logits = self.logits(pictures) / np.float32(self.temperature)
        power = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares: npt.NDArray[np.float32] = power / power.sum(axis=1, keepdims=True)
        return shares


def _described(file: Path, session: Any) -> dict[str, Any]:
    """Read the fields of a classifier from the metadata, and check them."""
    text = session.get_modelmeta().custom_metadata_map.get(METADATA)
    if text is None:
        raise DataError(f"{file} was not written by `gammabeta export`: it says nothing of classes and input")
    try:
        document = json.loads(text)
        classes = tuple(str(name) for name in document["classes"])
        given = document["preprocessing"]
        channels, height, width = (given[name] for name in ("channels", "height", "width"))
        mean, scale = (np.asarray(given[name], np.float32).reshape(-1, 1, 1) for name in ("mean", "scale"))
        style, kept = given["style"], given.get("preparation")
        temperature = float(given.get("temperature", 1.0))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        raise DataError(f"{file} does not name its classes and preprocessing: export it from a run") from None
    finite = np.isfinite(mean).all() and np.isfinite(scale).all()
    finite &= 0.01 <= temperature <= 100
    whole = all(type(value) is int for value in (channels, height, width))
    if not (whole and finite and len(mean) == len(scale) == channels) or style not in (
        "digit",
        "object",
        "plain",
        None,
    ):
        raise DataError(f"{file} describes an input that cannot be: it is damaged")
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1 or inputs[0].shape[1:] != [channels, height, width]:
        raise DataError(f"{file} does not take the pictures it describes")
    given_back = outputs[0].shape[1:]
    if len(given_back) != 1 or (isinstance(given_back[0], int) and given_back[0] != len(classes)):
        raise DataError(f"{file} names {len(classes)} classes and gives another number")
    size = (height, width)
    try:
        preparation = earlier(channels, size, style) if kept is None else preparation_of(kept)
    except DataError as error:
        raise DataError(f"{file}: its preparation is damaged: {error}") from None
    if (preparation.channels, preparation.size) != (channels, size):
        raise DataError(f"{file} describes two inputs: it is damaged")
    described = {"classes": classes, "channels": channels, "size": size, "preparation": preparation}
    return {**described, "mean": mean, "scale": scale, "style": style, "temperature": temperature}
