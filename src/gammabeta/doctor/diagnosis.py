"""``diagnose``: gather the evidence, leave the model as it was, run the checks, report."""

import math
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ..arguments import check_batches, check_model
from ..errors import UsageError
from ..graph.layers import unwrap
from ..stats import batches
from ..stats import samples as samples_of
from ..stats.preserve import preserved, remember_random_state
from . import reach, repeats, static, trace
from .checks import run_checks
from .collect import Collector, LossFn, first_line, suppress_single_sample
from .evidence import Evidence, Surroundings
from .noise import generators_kept
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

    Modules, buffers and the optimiser are always examined. With an ``example`` the model is traced on two
    samples; without one, the loader's first batch is the example. With a ``loader`` the model is run over the
    data in four modes: each sample at most six times, and up to four batches drawn anew from it, if batch
    statistics change the result. Memory does not grow with the number of batches.

    The model is left as it was, also when something raises: parameters, buffers, gradients, modes, hooks,
    momentum and the random state. The report lists what could not be examined, and why.

    Args:
        model: any module; ``torch.compile`` and ``DistributedDataParallel`` wrappers are looked through.
        loader: any iterable of batches: tensors (N, …), ``(input, target)`` tuples, or dicts. The data is
            read twice; an iterator is therefore kept in memory, up to ``samples``.
        loss: ``loss(output, target) -> float``, the mean over the batch; ``target`` is the second of a tuple,
            or else the whole batch. Without it the gap is measured by the change of the output.
        optimizer: the one that trained the model, for its number of steps and its weight decay.
        example: one batch, as a loader would give it; it is not kept.
        forward_fn: ``forward_fn(model, batch)`` runs the model; needed where its input is not the batch, its
            first element, or keywords.
        samples: stop after the batch with which this many samples have been seen; None: use all.
        source: the framework that the weights come from, when it is not PyTorch.
        progress: called after each batch of each of the two passes with its number of samples.

    Returns:
        A :class:`Report`. Under ``torch.distributed`` every rank must call this function, because their
        buffers are compared.

    Raises:
        UsageError: an argument that cannot be used. Errors of the loader or the model pass through, unless an
            unusable ``eps`` explains why the model cannot run.
    """
    if samples is not None and samples < 1:
        raise UsageError(f"samples must be at least 1, not {samples}")
    check_model("diagnose", model)
    if loader is not None:
        check_batches("diagnose", loader)
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
    with preserved(inner, loader), generators_kept(inner), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of training: they are not about this diagnosis
        again = None if loader is None else _repeatable(loader, samples)
        if example is None and again is not None:
            example = next(iter(again()), None)
        if example is not None:
            _examine_example(inner, forward, batches.move(example, *batches.placement(inner)), evidence)
        if again is not None:
            reported = progress or (lambda size: None)
            collector = Collector(inner, again, forward, loss, samples, reported, evidence.own_statistics)
            _examine_data(collector, evidence)
    return Report(evidence, run_checks(evidence))


def _repeatable(loader: Iterable[Any], samples: int | None) -> Callable[[], Iterable[Any]]:
    """A function that gives the same batches each time it is called."""
    if isinstance(loader, Iterator):
        held = list(batches.whole_batches(loader, samples, (torch.device("cpu"), None)))
        return lambda: held
    put_back_random_state = remember_random_state(loader)

    def again() -> Iterable[Any]:
        put_back_random_state()
        return loader

    return again


def _examine_data(collector: Collector, evidence: Evidence) -> None:
    try:
        collector.collect(evidence)
    except Exception as error:
        explained = any(f.check == "eps" and f.severity == "error" for f in run_checks(evidence))
        if not (collector.in_model and explained):
            raise
        evidence.not_examined.append(f"the data: {first_line(error)}")


def _examine_example(model: nn.Module, forward: batches.ForwardFn, batch: Any, evidence: Evidence) -> None:
    """Trace a few samples; what fails is noted in the report, and the rest goes on."""
    total = samples_of.count(batch)

    def run(index: torch.Tensor) -> Any:
        return forward(model, samples_of.take(batch, index, total))

    few = partial(run, torch.arange(min(TRACED_SAMPLES, total)))
    with _probe("tracing", model, evidence):
        model.eval()
        evidence.surroundings |= trace.surroundings(model, few)
    with _probe("a pass over the example", model, evidence):
        _reach(model, partial(forward, model, batch), evidence)
    with _probe("the gradient probe", model, evidence):
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters()):
            evidence.not_examined.append(
                "the gradient probe: parameters have hooks of their own, which it would run"
            )
        else:
            model.train()
            evidence.updated_in_backward = trace.updated_in_backward(model, few)
    with _probe("comparing a sample alone and with others", model, evidence):
        model.eval()
        chosen, ragged = _compared(batch, total)
        found = repeats.compare(model, run, chosen, ragged=ragged)
        evidence.repeats_differ, evidence.batch_dependence = found


def _compared(batch: Any, total: int) -> tuple[torch.Tensor, bool]:
    """Which samples are compared; of samples of different sizes, the largest and those that fit into it."""
    first = torch.arange(min(COMPARED_SAMPLES, total))
    shapes = samples_of.sizes(batch, total)
    if len(set(shapes)) < 2:
        return first, False
    largest = max(range(total), key=lambda index: math.prod(shapes[index]))
    size = shapes[largest]
    fitting = [
        index
        for index, shape in enumerate(shapes)
        if len(shape) == len(size) and all(map(operator.le, shape, size)) and index != largest
    ]
    return torch.tensor([largest, *fitting[: COMPARED_SAMPLES - 1]]), True


@contextmanager
def _probe(what: str, model: nn.Module, evidence: Evidence) -> Iterator[None]:
    """Leave the model as it was; note what fails in the report."""
    try:
        with preserved(model):
            yield
    except Exception as error:  # the model's own code: anything may come out of it
        evidence.not_examined.append(f"{what}: {first_line(error)}")


def _reach(model: nn.Module, run: Callable[[], Any], evidence: Evidence) -> None:
    """Over the whole example, in both modes: which layers are called, how often, and who keeps statistics."""
    model.eval()
    in_eval = reach.calls(model, run)
    evidence.unreached = reach.unreached(model, run, set(in_eval))
    in_train = Counter[str]()
    with suppress_single_sample(), preserved(model):
        model.train()
        with reach.writing(model) as written:
            in_train = reach.calls(model, run)
        evidence.own_statistics = tuple(written)
    evidence.unreached = tuple(name for name in evidence.unreached if name not in in_train)
    for name, called in in_train.items():
        around = evidence.surroundings.get(name, Surroundings())
        vary = around.calls is not None and around.calls != called
        evidence.surroundings[name] = replace(around, calls=called, calls_vary=vary)
