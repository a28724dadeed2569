"""The ways to run a model that are compared: as it is, converted, folded, and by other compilers."""

import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..conversion.convert import convert
from ..errors import GammabetaError, SurgeryError, UnavailableError
from ..export import export_onnx, onnx_session
from ..folding import fold
from ..folding.verify import copied
from ..graph.record import as_inputs
from ..text import first_line
from .step import Step, synchronize

AS_IT_IS = "as it is"
FOLDED = "folded"
COMPILE = "torch.compile"
ONNX = "ONNX Runtime"
BESIDE = {"compile": COMPILE, "onnx": ONNX}

Loss = Callable[[Any], Tensor] | None
Steps = dict[str, Callable[[], Step]]  # what makes each; it may raise a GammabetaError that says why not
Evaluations = dict[str, Callable[[], Callable[[], Any]]]


def training_steps(model: nn.Module, example: Any, loss: Loss, compiled: bool) -> Steps:
    """Return what makes a training step of the model, of its conversions, and of ``torch.compile``'s."""
    step = partial(_step, model, example, loss)
    made: Steps = {
        AS_IT_IS: lambda: step(lambda m: m),
        "fused": lambda: step(lambda m: convert(m, "fused", example)),
        "fused, recompute": lambda: step(lambda m: convert(m, "fused", recompute=True)),
    }
    return made | ({COMPILE: lambda: _compiled_step(step)} if compiled else {})


def tuning_steps(model: nn.Module, example: Any, loss: Loss) -> Steps:
    """Return the same for fine-tuning with frozen statistics, while gamma and beta learn on."""
    step = partial(_step, model, example, loss)
    return {AS_IT_IS: lambda: step(_frozen), "tune": lambda: step(lambda m: convert(m, "tune", example))}


def evaluations(model: nn.Module, example: Any, beside: tuple[str, ...]) -> Evaluations:
    """Return what makes an evaluation of the model, of its fold, and of what is to stand beside them."""
    made: Evaluations = {
        AS_IT_IS: lambda: _evaluation(copied(model).eval(), example),
        FOLDED: lambda: _evaluation(fold(copied(model).eval(), example), example),
    }
    others = {"compile": _compiled_evaluation, "onnx": _onnx}
    return made | {BESIDE[name]: partial(others[name], model, example) for name in beside}


def _step(model: nn.Module, example: Any, loss: Loss, change: Callable[[nn.Module], nn.Module]) -> Step:
    return Step(change(copied(model).train()), as_inputs(example), loss)


def _frozen(model: nn.Module) -> nn.Module:
    """Put the batch norms into evaluation mode: torch's way to freeze their statistics."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return model


def _evaluation(model: nn.Module, example: Any) -> Callable[[], Any]:
    args, kwargs = as_inputs(example)

    def evaluate() -> Any:
        with torch.inference_mode():
            output = model(*args, **kwargs)
        synchronize(model)
        return output

    return evaluate


def _compiled_step(step: Callable[..., Step]) -> Step:
    torch.compiler.reset()
    made = step(torch.compile)
    with _compiling():
        made()
    return made


def _compiled_evaluation(model: nn.Module, example: Any) -> Callable[[], Any]:
    torch.compiler.reset()
    made: Any = torch.compile(copied(model).eval())
    evaluate = _evaluation(made, example)
    with _compiling():
        evaluate()
    return evaluate


@contextmanager
def _compiling() -> Iterator[None]:
    """Hide what ``torch.compile`` logs at the first call, and turn what it raises into one line."""
    log = logging.getLogger("torch")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except GammabetaError:
        raise
    except Exception as error:
        raise SurgeryError(f"it cannot compile this model: {first_line(error)}") from error
    finally:
        log.setLevel(level)


def _onnx(model: nn.Module, example: Any) -> Callable[[], list[Tensor]]:
    """ONNX Runtime on the file that ``export_onnx`` writes."""
    if any(parameter.is_cuda for parameter in model.parameters()):
        raise UnavailableError("it is compared on the CPU only")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(copied(model).eval(), path, example)
        session = onnx_session(path.read_bytes())
    return partial(session, as_inputs(example))
