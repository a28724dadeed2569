"""``diagnose``: gather the evidence without leaving a trace, run the checks, report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import nn

from ..errors import UsageError
from ..graph.layers import unwrap
from ..stats import batches
from ..stats.preserve import RandomState, preserved, same_bits
from . import static, trace
from .checks import run_checks
from .collect import LossFn, Passes
from .evidence import Evidence
from .report import Report

Source = Literal["pytorch", "keras", "flax", "equinox", "mxnet", "onnx"]
TRACED_SAMPLES = 2
COMPARED_SAMPLES = 8


def diagnose(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    loss: LossFn | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    example: Any = None,
    forward_fn: batches.ForwardFn | None = None,
    samples: int | None = None,
    source: Source | None = None,
    progress: Callable[[int], object] | None = None,
) -> Report:
    """Say what is wrong with the batch normalization in ``model``: evidence, cause and remedy.

    Modules, buffers and the optimiser are looked at in any case. With an ``example`` (or a loader, whose
    first batch then serves as one) the model is traced on two samples; with a ``loader`` it is run over the
    data in four modes. Each sample is run at most six times, and memory does not grow with the number of
    batches.

    The model is left as it was, also when something raises: parameters, buffers, gradients, modes, hooks,
    momentum and the random state. What cannot be looked at, and why, is listed in the report.

    Args:
        model: any module; ``torch.compile`` and ``DistributedDataParallel`` wrappers are looked through.
        loader: any iterable of batches: tensors (N, …), ``(input, target)`` tuples, or dicts. An iterator is
            read into memory, up to ``samples``, because the data is passed over twice.
        loss: ``loss(output, target) -> float``, the mean over the batch; ``target`` is the second of a tuple,
            or else the whole batch. Without it the gap is judged by the change of the output.
        optimizer: the one that trained the model, for its number of steps and its weight decay.
        example: one batch, of the form that a loader would give; never kept.
        forward_fn: ``forward_fn(model, batch)`` runs the model where its input is not the batch, its first
            element, or keywords.
        samples: look at whole batches until this many samples have been seen; None: all.
        source: the framework that the weights come from, when it is not PyTorch.
        progress: called after each batch of each of the two passes with its number of samples.

    Returns:
        A :class:`Report`. Under ``torch.distributed`` every rank must call this function: buffers are
        compared.

    Raises:
        UsageError: an argument that cannot be used. Whatever the loader or the model raises on the data
            passes through, except where an unusable ``eps`` explains why the model cannot run.
    """
    if samples is not None and samples < 1:
        raise UsageError(f"samples must be at least 1, not {samples}")
    inner = unwrap(model)
    forward = forward_fn or batches.call
    evidence = Evidence(
        layers=static.read_layers(inner),
        surroundings=static.read_sequences(inner),
        optimizer=static.read_optimizer(inner, optimizer),
        source=source,
        model_training=inner.training,
        loader=static.read_loader(loader),
        ranks=static.read_ranks(inner),
    )
    with preserved(inner, loader), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of training: a report speaks of what matters
        again = _repeatable(loader, samples)
        if example is None and again is not None:
            example = next(iter(again()), None)
        if example is not None:
            _look_at_example(inner, forward, batches.move(example, *batches.placement(inner)), evidence)
        if again is not None:
            _look_at_data(Passes(inner, again, forward, loss, samples, progress), evidence)
    return Report(evidence, run_checks(evidence))


def _repeatable(loader: Iterable[Any] | None, samples: int | None) -> Callable[[], Iterable[Any]] | None:
    """A function that gives the same batches each time it is called."""
    if loader is None:
        return None
    if isinstance(loader, Iterator):
        held = list(batches.batches(loader, samples, (torch.device("cpu"), None)))
        return lambda: held
    start = RandomState.of(loader)

    def again() -> Iterable[Any]:
        start.restore()
        return loader

    return again


def _look_at_data(passes: Passes, evidence: Evidence) -> None:
    try:
        outcome = passes.run()
    except Exception as error:
        explained = any(
            finding.check == "eps" for finding in run_checks(evidence) if finding.at_least("error")
        )
        if not (passes.in_model and explained):
            raise
        evidence.not_examined.append(f"the data: {type(error).__name__}: {first_line(error)}")
        return
    if not outcome.samples:
        raise UsageError("the loader gave no data: there is nothing to look at")
    evidence.activity, evidence.gap = outcome.activity, outcome.gap
    evidence.changed_in_eval, evidence.batch_images = outcome.changed_in_eval, tuple(outcome.images)
    evidence.samples = outcome.samples


def _look_at_example(model: nn.Module, forward: batches.ForwardFn, batch: Any, evidence: Evidence) -> None:
    """Trace a few samples; what fails is noted in the report, and the rest goes on."""
    total = batches.size(batch)
    few = batches.take(batch, torch.arange(min(TRACED_SAMPLES, total)), total)
    probes: list[tuple[str, Callable[[], None]]] = [
        ("tracing", lambda: _trace(model, forward, few, evidence)),
        ("the gradient probe", lambda: _probe_backward(model, forward, few, evidence)),
        ("comparing a sample alone and in company", lambda: _compare(model, forward, batch, evidence)),
    ]
    for what, probe in probes:
        try:
            with preserved(model):
                probe()
        except Exception as error:  # the model's own code: anything may come out of it
            evidence.not_examined.append(f"{what}: {type(error).__name__}: {first_line(error)}")


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).partition("\n")[0]


def _trace(model: nn.Module, forward: batches.ForwardFn, batch: Any, evidence: Evidence) -> None:
    model.eval()
    found = trace.surroundings(model, lambda: forward(model, batch))
    evidence.surroundings = evidence.surroundings | found


def _probe_backward(model: nn.Module, forward: batches.ForwardFn, batch: Any, evidence: Evidence) -> None:
    hooked = [p for p in model.parameters() if p._backward_hooks or p._post_accumulate_grad_hooks]
    if hooked:
        evidence.not_examined.append(
            "the gradient probe: parameters have hooks of their own that it would run"
        )
        return
    model.train()
    evidence.updated_in_backward = trace.updated_in_backward(model, lambda: forward(model, batch))


def _compare(model: nn.Module, forward: batches.ForwardFn, batch: Any, evidence: Evidence) -> None:
    """Evaluate a few samples twice in one company, and once in another; a sample must not notice."""
    total = batches.size(batch)
    count = min(COMPARED_SAMPLES, total)
    model.eval()
    start = RandomState.of()

    def run(index: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            out = forward(model, batches.take(batch, index, total))
        return [t[: len(index)].double() for t in trace.tensors(out) if t.dim() and t.shape[0] == len(index)]

    def first(index: torch.Tensor) -> list[torch.Tensor]:
        """The outputs for some of the samples, from the same random numbers and buffers each time."""
        with preserved(model):
            return run(index)

    everyone = torch.arange(count)
    together = first(everyone)
    with preserved(model):
        run(everyone)
        start.restore()
        evidence.repeats_differ = _largest_change(together, run(everyone))
    if count > 1:
        company = [first(index) for index in torch.split(everyone, 2 if count > 3 else 1)]
        evidence.batch_dependence = _largest_change(
            together, [torch.cat(parts) for parts in zip(*company, strict=True)]
        )


def _largest_change(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Largest absolute difference, in units of the output's standard deviation."""
    changes = [0.0]
    for a, b in zip(one, other, strict=False):
        if a.shape == b.shape and a.numel() and not same_bits(a, b):
            spread = float(a.std()) if a.numel() > 1 else 0.0
            largest = float((a - b).abs().max())
            changes.append(largest / max(spread, float(a.abs().max()) * 1e-6, 1e-30))
    return max(changes)
