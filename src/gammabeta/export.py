"""``export_onnx``: fold, export, check, compare ONNX Runtime with the model, and only then write the file."""

import importlib
import inspect
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import __version__
from .arguments import check_model, check_type
from .data import Preparation
from .data.onnxfile import METADATA
from .errors import SurgeryError, UnavailableError, UsageError, installing
from .files import write_atomically
from .folding import FoldReport, fold, plain_mode
from .folding.layers import plain
from .folding.verify import Verifier, copied, default_tolerance, distance
from .graph.layers import unwrap
from .graph.record import Inputs, as_inputs, map_tensors, tensors_in
from .text import first_line

_OTHER_BATCHES = (1, 3)  # sizes to compare at, beside the example's own


@dataclass(frozen=True)
class Preprocessing:
    """How pictures become the model's input: ``(pixel - mean) * scale`` per channel, pixels 0 to 255.

    ``style``: how a picture of another size or ink is prepared, as in ``gammabeta.data.picture``; None: its
    default for the number of channels. ``preparation``: all that is known of that, as a run folder keeps it.
    ``temperature``: by which the output is divided before a softmax makes probabilities of it.
    """

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    style: str | None = None
    preparation: Preparation | None = None
    temperature: float = 1.0


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far ONNX Runtime is from the model.

    ``error``: largest difference over largest magnitude between ONNX Runtime's output and the given model's
    in float64, over every input of ``batches`` sizes tried. ``original_error``: the model's own, in its own
    dtype.
    """

    path: Path
    size: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    batches: tuple[int, ...]
    error: float
    original_error: float
    opset: int
    fold: FoldReport

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return {**asdict(self), "path": str(self.path)}


@plain_mode()
def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: Any,
    *,
    classes: list[str] | tuple[str, ...] | None = None,
    preprocessing: Preprocessing | None = None,
    tolerance: float | None = None,
) -> ExportReport:
    """Fold ``model`` and write it as ONNX, with the batch size left open.

    The graph must pass ONNX's checker. ONNX Runtime's output must equal the given model's, within
    ``tolerance``, on the example and on inputs like it, at the example's batch size and at 1 and 3. Only then
    the file is written, whole. After any error an existing file, and the model, are as they were.

    Args:
        model: any module that ``fold`` takes and ``torch.export`` traces.
        path: the file to write.
        example: as for ``fold``; its batch size is the first dimension of its first tensor.
        classes: names of the classes, kept in the file's metadata for ``gammabeta predict``.
        preprocessing: how pictures become the input, kept likewise.
        tolerance: allowed relative difference beyond twice the model's own; by default as for ``fold``.

    Returns:
        An ``ExportReport``.

    Raises:
        UnavailableError: onnx, onnxruntime or onnxscript is not installed.
        UsageError: the example is of the wrong kind, or the folder does not exist.
        SurgeryError: the model cannot be exported, or the exported one differs.
    """
    check_model("export_onnx", model)
    check_type("export_onnx", "path", path, str | os.PathLike, "the file to write, and the example after it")
    onnx, _ = _libraries()
    target = Path(path)
    if not target.parent.is_dir():
        raise UsageError(f"there is no folder {target.parent} to write {target.name} into")
    inputs = as_inputs(example)
    folded = fold(model, example, tolerance=tolerance, pack=False)
    report: FoldReport = folded.fold_report  # type: ignore[assignment]
    graph = _exported(plain(unwrap(folded)), _batched(inputs, 2))
    _describe(graph, classes, preprocessing, report)
    try:
        onnx.checker.check_model(graph, full_check=True)
    except Exception as error:
        raise SurgeryError(f"ONNX's checker refuses the exported model: {first_line(error)}") from error
    content = graph.SerializeToString()
    sizes = (_batch_of(inputs), *_OTHER_BATCHES)
    limit = tolerance if tolerance is not None else default_tolerance(model)
    gap, own = _compare(content, model, [_batched(inputs, size) for size in sizes], limit)
    write_atomically(target, content, UsageError)
    return ExportReport(
        target,
        len(content),
        tuple(value.name for value in graph.graph.input),
        tuple(value.name for value in graph.graph.output),
        sizes,
        gap,
        own,
        max(entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx")),
        report,
    )


def _libraries() -> tuple[Any, Any]:
    found = []
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            found.append(importlib.import_module(name))
        except ImportError:
            raise UnavailableError(
                f"{name} is not installed, and ONNX export needs it: {installing('onnx')}"
            ) from None
    importlib.import_module("onnx.checker")
    return found[0], found[2]


def _exported(model: nn.Module, inputs: Inputs) -> Any:
    """Return the ONNX graph of ``model``, its first dimension open."""
    single = len(list(tensors_in(inputs))) == 1
    try:
        with _silence():
            program = torch.onnx.export(
                model,
                inputs[0],
                kwargs=inputs[1],
                dynamo=True,
                dynamic_shapes=_open_batch(model, inputs),
                input_names=["input"] if single else None,
                verbose=False,
            )
    except Exception as error:
        scripted = [n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
        where = f"{scripted[0]} is TorchScript, put the Python module in its place; " if scripted else ""
        raise SurgeryError(f"the model cannot be exported to ONNX: {where}{_cause(error)}") from error
    if program is None:
        raise SurgeryError("the model cannot be exported to ONNX: torch gave nothing back")
    return program.model_proto


def _open_batch(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Describe every tensor argument whose first dimension is the batch as open in it."""
    args, kwargs = inputs
    batch = torch.export.Dim("batch")
    size = _batch_of(inputs)

    def shape(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {0: batch} if value.dim() and value.shape[0] == size else {}
        if isinstance(value, list | tuple):
            return [shape(item) for item in value]
        if isinstance(value, dict):
            return {key: shape(item) for key, item in value.items()}
        return None

    return _by_parameter(model, args, kwargs, shape)


def _by_parameter(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shape: Callable[[Any], Any]
) -> dict[str, Any]:
    """The shapes of all arguments by the parameters they go to: many in ``*args`` and ``**kwargs``."""
    signature = inspect.signature(model.forward)
    found = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            found[name] = tuple(map(shape, value))
        elif kind is inspect.Parameter.VAR_KEYWORD:
            found |= {key: shape(item) for key, item in value.items()}
        else:
            found[name] = shape(value)
    return found


@contextmanager
def _silence() -> Iterator[None]:
    """Hide the exporter's own output: progress on standard output, logs and warnings."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _describe(graph: Any, classes: Any, preprocessing: Preprocessing | None, report: FoldReport) -> None:
    document = {
        **_metadata(classes, preprocessing),
        "folded": [layer.name for layer in report.folded],
        "left": {layer.name: layer.reason for layer in report.left},
    }
    entry = graph.metadata_props.add()
    entry.key, entry.value = METADATA, json.dumps(document)
    graph.producer_name, graph.producer_version = "gammabeta", __version__


def _metadata(classes: Any, preprocessing: Preprocessing | None) -> dict[str, Any]:
    given = None if preprocessing is None else asdict(preprocessing)
    if given is not None and given["preparation"] is None:
        del given["preparation"]
    names = None if classes is None else [str(name) for name in classes]
    return {"format": 1, "version": __version__, "classes": names, "preprocessing": given}


@plain_mode()
def save_program(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: Any,
    *,
    classes: list[str] | tuple[str, ...] | None = None,
    preprocessing: Preprocessing | None = None,
) -> None:
    """Write ``model`` as a ``torch.export`` program, its batch size left open: whole, or not at all.

    ``torch.export.load(path).module()`` runs it where gammabeta is not installed. ``classes`` and
    ``preprocessing`` are kept as in an ONNX file, as JSON in the program's extra file ``gammabeta``.

    Raises:
        UsageError: the example is of the wrong kind, or the file cannot be written.
        SurgeryError: ``torch.export`` does not trace the model.
    """
    inputs = _batched(as_inputs(example), 2)
    try:
        with _silence():
            program = torch.export.export(
                plain(copied(unwrap(model))), inputs[0], inputs[1], dynamic_shapes=_open_batch(model, inputs)
            )
            buffer = io.BytesIO()
            described = {METADATA: json.dumps(_metadata(classes, preprocessing))}
            torch.export.save(program, buffer, extra_files=described)
    except Exception as error:
        raise SurgeryError(f"torch.export cannot trace the model: {_cause(error)}") from error
    write_atomically(Path(path), buffer.getvalue(), UsageError)


def onnx_session(content: bytes) -> Callable[[Inputs], list[Tensor]]:
    """Return a function that runs an ONNX file's content in ONNX Runtime, on the CPU.

    Raises:
        UnavailableError: onnx, onnxruntime or onnxscript is not installed.
        SurgeryError: ONNX Runtime cannot load or run it.
    """
    _, runtime = _libraries()
    try:
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise SurgeryError(f"ONNX Runtime cannot load the exported model: {first_line(error)}") from error
    return partial(_session_run, session)


def _compare(content: bytes, model: nn.Module, batches: list[Inputs], limit: float) -> tuple[float, float]:
    """Run ONNX Runtime and the given model on the same inputs; raise if they differ."""
    run = onnx_session(content)
    original = copied(unwrap(model)).eval()
    worst, own = 0.0, 0.0
    for batch in batches:
        verifier = Verifier(original, batch)
        own = max(own, verifier.original)
        for inputs, truth in zip(verifier.inputs, verifier.truth, strict=True):
            worst = max(worst, distance(run(inputs), truth))
    if not worst <= limit + 2 * own:
        raise SurgeryError(f"ONNX Runtime's output differs from the model's by {worst:.1e} relative")
    return worst, own


def _session_run(session: Any, inputs: Inputs) -> list[Tensor]:
    names = [value.name for value in session.get_inputs()]
    arrays = [tensor.detach().cpu().numpy() for tensor in tensors_in(inputs)]
    if len(names) != len(arrays):
        raise SurgeryError(
            f"the exported model takes {len(names)} inputs where the example has {len(arrays)}"
        )
    try:
        outputs = session.run(None, dict(zip(names, arrays, strict=True)))
    except Exception as error:
        raise SurgeryError(f"ONNX Runtime cannot run the exported model: {first_line(error)}") from error
    return [torch.from_numpy(np.asarray(output)) for output in outputs]


def _batch_of(inputs: Inputs) -> int:
    first = next((tensor for tensor in tensors_in(inputs) if tensor.dim()), None)
    if first is None or first.shape[0] == 0:
        raise UsageError("the example must hold a tensor whose first dimension is the batch, and not empty")
    return int(first.shape[0])


def _batched(inputs: Inputs, size: int) -> Inputs:
    """Return the example at another batch size: its samples repeated or cut."""
    batch = _batch_of(inputs)

    def resize(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != batch:
            return tensor
        return tensor[torch.arange(size, device=tensor.device) % batch]

    resized: Inputs = map_tensors(inputs, resize)
    return resized


def _cause(error: BaseException) -> str:
    """The innermost cause: torch wraps it in a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
