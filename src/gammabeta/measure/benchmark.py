"""``benchmark``: what convert and fold gain on a user's own model, and that the results are the same."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_model
from ..errors import GammabetaError, SurgeryError, UsageError, out_of_memory
from ..folding.verify import copied, distance
from ..graph.layers import batch_norm_layers, unwrap
from ..graph.record import as_inputs, tensors_in
from ..stats.preserve import remember_random_state
from ..text import first_line
from .report import EVALUATION, TRAINING, TUNING, BenchmarkReport, Row
from .step import Step, kept_for_backward, share_of_batch_norm
from .timing import interleave
from .variants import AS_IT_IS, BESIDE, evaluations, training_steps, tuning_steps

# How far outputs may be apart: sums in another order, in a deep network.
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
_ROUNDS = 101  # at most

Progress = Callable[[str, float | None], object]


def benchmark(
    model: nn.Module,
    example: Any,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    training: bool = True,
    beside: Iterable[str] = ("compile", "onnx"),
    seconds: float = 30.0,
    progress: Progress | None = None,
) -> BenchmarkReport:
    """Time a model as it is, converted and folded, on one example, once their results have been compared.

    A training step is forward, loss and backward; the optimiser, which is the same for all, is left out.
    Everything runs on copies: the model is left as it is. All ways of one task are timed in interleaved
    rounds. A way whose outputs differ from the model's, or that cannot be had, has a reason in place of
    figures.

    Args:
        model: any module with batch normalization, on the device where it is to be measured.
        example: as for ``fold``, of the batch size and resolution that matter.
        loss: called with the model's output, gives a scalar; by default the mean square of the outputs.
        training: whether to make training steps at all.
        beside: what else to time where it can be had: ``"compile"`` (torch.compile) and ``"onnx"`` (ONNX
            Runtime, evaluation only). Compiling takes its own time, often minutes for a large model.
        seconds: for all timed rounds together; every task gets three rounds at least. Converting, comparing
            and compiling come on top.
        progress: called with what is being done and the share of it that is done, or None.

    Returns:
        A ``BenchmarkReport``.

    Raises:
        UsageError: the model has no batch norm, or does not run on the example.
    """
    others = tuple(beside)
    if unknown := [name for name in others if name not in BESIDE]:
        raise UsageError(f"unknown {unknown[0]!r} in beside: choose of {', '.join(BESIDE)}")
    if not seconds > 0:
        raise UsageError(f"seconds must be above 0, not {seconds}")
    check_model("benchmark", model)
    inner, inputs = unwrap(model), as_inputs(example)
    norms = batch_norm_layers(inner)
    if not norms:
        raise UsageError("the model has no batch normalization: there is nothing to convert or fold")
    tell = progress or (lambda _task, _done: None)
    _runs(inner, inputs, training, loss)
    tasks: dict[str, dict[str, Callable[[], Any]]] = {}
    if training:
        tasks[TRAINING] = dict(training_steps(inner, example, loss, "compile" in others))
        tasks[TUNING] = dict(tuning_steps(inner, example, loss))
    tasks[EVALUATION] = dict(evaluations(inner, example, others))
    rows: list[Row] = []
    share = None
    for task, ways in tasks.items():
        programs, made = _made(task, ways, tell)
        if task == TRAINING:
            share = share_of_batch_norm(programs[AS_IT_IS])
        rows += _timed(task, programs, made, seconds / len(tasks), tell)
    return BenchmarkReport(tuple(rows), len(norms), share, torch.get_num_threads())


def _runs(model: nn.Module, inputs: Any, training: bool, loss: Any) -> None:
    """Raise unless the model does what is to be timed."""
    try:
        Step(copied(model).train(training), inputs, loss).forward() if training else None
        with torch.no_grad():
            copied(model).eval()(*inputs[0], **inputs[1])
    except GammabetaError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise UsageError(f"the model does not run on the example: {first_line(error)}") from error


def _made(task: str, ways: dict[str, Callable[[], Any]], tell: Progress) -> tuple[dict[str, Any], list[Row]]:
    """Make every way and compare its outputs with the model's.

    Returns:
        The programs, and a row for every way: what it keeps, how far it is apart, or why it is left out.
    """
    programs: dict[str, Any] = {}
    rows: list[Row] = []
    wanted: list[Tensor] = []
    for way, make in ways.items():
        tell(f"{task}: preparing {way}", None)
        try:
            program = make()
            outputs = _outputs(program)
            wanted = wanted or outputs
            apart = distance(outputs, wanted)
            if not apart <= max((_TOLERANCE.get(t.dtype, 0.0) for t in wanted), default=0.0):
                raise SurgeryError(f"its outputs differ by {apart:.0e} of the largest")
        except GammabetaError as error:
            if way == AS_IT_IS:
                raise
            rows.append(Row(task, way, reason=str(error)))
        else:
            kept = kept_for_backward(program) if isinstance(program, Step) else None
            rows.append(Row(task, way, kept=kept, apart=apart))
            programs[way] = program
    return programs, rows


def _outputs(program: Any) -> list[Tensor]:
    """What a program computes, from the same random numbers each time."""
    put_back = remember_random_state()
    try:
        torch.manual_seed(0)
        output = program.forward()[0] if isinstance(program, Step) else program()
        return [tensor.detach().clone() for tensor in tensors_in(output)]
    finally:
        put_back()


def _timed(task: str, programs: dict[str, Any], rows: list[Row], seconds: float, tell: Progress) -> list[Row]:
    """The rows with the times of their programs."""
    what = f"{task}: timing {len(programs)} ways"
    found = interleave(programs, rounds=_ROUNDS, seconds=seconds, progress=lambda done: tell(what, done))
    base = found[AS_IT_IS].median
    timed = []
    for row in rows:
        if row.way in found:
            t = found[row.way]
            row = replace(row, seconds=t.median, lower=t.lower, upper=t.upper, times=base / t.median)
        timed.append(row)
    return timed
