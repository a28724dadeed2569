"""``distil``: train one model to give what another gives, on data without labels."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_batches, check_model
from ..errors import DivergedError, SurgeryError, UsageError
from ..graph.layers import BatchNormLayer
from ..graph.record import tensors_in
from ..stats.batches import ForwardFn, call, placement, target, whole_batches
from ..stats.preserve import preserved, set_modes

_INSIDE = 0.3  # the weight of what leaves the norms; with 1 a small network came less near in 400 steps


@dataclass(frozen=True)
class Closeness:
    """How near one model's outputs are to another's, on some data.

    Attributes:
        distance: ‖new − old‖ / ‖old‖ over all outputs.
        agreement: the share of samples with the same class, where outputs are (N, classes); else None.
        accuracy: of the old and the new model, where batches are ``(input, class)``; else None.
    """

    distance: float
    agreement: float | None = None
    accuracy: tuple[float, float] | None = None

    def __str__(self) -> str:
        text = f"outputs differ by {self.distance:.1%}"
        if self.agreement is not None:
            text += f", {self.agreement:.2%} of the classes agree"
        if self.accuracy is not None:
            text += f", accuracy {self.accuracy[0]:.2%} (old) and {self.accuracy[1]:.2%} (new)"
        return text


@dataclass(frozen=True)
class DistillationReport:
    """The outputs before and after ``distil``, and the steps taken."""

    before: Closeness
    after: Closeness
    steps: int

    def __str__(self) -> str:
        return f"before: {self.before}\nafter {self.steps} steps: {self.after}"


def distil(
    new: nn.Module,
    old: nn.Module,
    loader: Iterable[Any],
    *,
    steps: int = 400,
    learning_rate: float = 3e-3,
    forward_fn: ForwardFn | None = None,
    progress: Callable[[int, float], object] | None = None,
) -> DistillationReport:
    """Train ``new`` in place until its outputs are those of ``old``, on unlabelled data.

    The loss is the squared distance of the outputs, and 0.3 times the mean of that of what leaves the norms
    of the same names (Romero et al. 2015, "FitNets", equation 3), each relative to the square of what
    ``old`` gives. AdamW, without decay; the learning rate rises for a tenth of the steps and falls as a
    cosine. ``old`` is in evaluation and does not change.

    Args:
        new: what ``convert(old, to="group")`` made, or any model of the same inputs and outputs.
        old: the model to imitate.
        loader: batches, as for ``recalibrate``; targets are used only to report the accuracy. It is iterated
            as often as needed; one that shuffles is better.
        steps: training steps.
        learning_rate: the highest one.
        forward_fn: ``forward_fn(model, batch)``, where the input is not the batch or its first element.
        progress: called after each step with the number of steps and the loss.

    Returns:
        How near the outputs are, before and after, on (at most 4,096 samples of) the loader's data.

    Raises:
        SurgeryError: no data, or outputs of other shapes. ``new`` is as it was.
        DivergedError: the loss is not finite. ``new`` is as it was.
        UsageError: a bad argument.
    """
    if steps < 1 or not learning_rate > 0:
        raise UsageError(f"steps and learning_rate must be above 0, not {steps} and {learning_rate}")
    check_model("distil", new, "new")
    check_model("distil", old, "old")
    check_batches("distil", loader)
    if isinstance(loader, Iterator):
        raise UsageError("distil passes over the data many times: give a loader or a list, not an iterator")
    forward = forward_fn or call
    before = closeness(new, old, loader, forward_fn=forward_fn)
    state = copy.deepcopy(new.state_dict())
    modes = {module: module.training for module in new.modules()}
    try:
        with preserved(old, loader):
            set_modes(old, training=False)
            _train(new, old, loader, forward, _Plan(steps, learning_rate, progress))
    except BaseException:
        new.load_state_dict(state)
        raise
    finally:
        for module, training in modes.items():
            module.training = training
    return DistillationReport(before, closeness(new, old, loader, forward_fn=forward_fn), steps)


@dataclass(frozen=True)
class _Plan:
    steps: int
    learning_rate: float
    progress: Callable[[int, float], object] | None

    def share(self, step: int) -> float:
        """Of the learning rate: it rises in a straight line, then falls as a cosine, to nearly nothing."""
        rising = max(1, self.steps // 10)
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step + 1 - rising) / (self.steps + 1 - rising)))


def _train(new: nn.Module, old: nn.Module, loader: Iterable[Any], forward: ForwardFn, plan: _Plan) -> None:
    set_modes(new, training=True)
    learning = [p for p in new.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, plan.learning_rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, plan.share)
    pairs = _pairs(new, old)
    for step, batch in enumerate(_endless(loader, new, plan.steps), 1):
        with _watched([b for _, b in pairs]) as wanted, torch.no_grad():
            goal = list(tensors_in(forward(old, batch)))
        with _watched([a for a, _ in pairs]) as given:
            out = list(tensors_in(forward(new, batch)))
        loss = _distance(out, goal)
        if pairs and len(given) == len(wanted):
            loss = loss + _INSIDE * _distance(given, wanted) / len(given)
        if not torch.isfinite(loss):
            raise DivergedError(
                f"the loss is not finite at step {step}: use a smaller learning_rate", step - 1
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if plan.progress is not None:
            plan.progress(step, loss.item())
    optimizer.zero_grad()


def _endless(loader: Iterable[Any], model: nn.Module, steps: int) -> Iterator[Any]:
    taken = 0
    while taken < steps:
        before = taken
        for batch in whole_batches(loader, None, placement(model)):
            yield batch
            taken += 1
            if taken == steps:
                return
        if taken == before:
            raise SurgeryError("the loader gave no data")


def _pairs(new: nn.Module, old: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """The norms of the new model, each with the batch norm of the same name."""
    norms = {name: module for name, module in old.named_modules() if isinstance(module, BatchNormLayer)}
    mine = dict(new.named_modules())
    return [(mine[name], norm) for name, norm in norms.items() if isinstance(mine.get(name), nn.GroupNorm)]


@contextmanager
def _watched(layers: list[nn.Module]) -> Iterator[list[Tensor]]:
    """The outputs of layers, in the order of their calls."""
    seen: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, out: seen.append(out)) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _distance(found: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """Σ ‖found − wanted‖² / ‖wanted‖² over pairs of tensors."""
    if [t.shape for t in found] != [t.shape for t in wanted]:
        raise SurgeryError("the two models give outputs of different shapes, so one cannot imitate the other")
    parts = [
        (a.float() - b.float()).square().sum() / b.float().square().sum().clamp(min=1e-12)
        for a, b in zip(found, wanted, strict=True)
        if b.is_floating_point()
    ]
    if not parts:
        raise SurgeryError("the model gives no floating-point output to imitate")
    return torch.stack(parts).sum()


def closeness(
    new: nn.Module,
    old: nn.Module,
    loader: Iterable[Any],
    *,
    samples: int = 4096,
    forward_fn: ForwardFn | None = None,
) -> Closeness:
    """Compare the outputs of two models in evaluation, on about ``samples`` samples; both stay as they are.

    Raises:
        SurgeryError: no data, or outputs of other shapes.
    """
    forward = forward_fn or call
    totals = torch.zeros(6, dtype=torch.float64)  # ‖new − old‖², ‖old‖², agreeing, samples, old and new right
    labelled = True
    with preserved(new, loader), preserved(old, loader), torch.no_grad():
        set_modes(new, training=False)
        set_modes(old, training=False)
        for batch in whole_batches(loader, samples, placement(new)):
            wanted, found = (list(tensors_in(forward(model, batch))) for model in (old, new))
            _distance(found, wanted)
            totals[0] += sum(
                (a.double() - b.double()).square().sum() for a, b in zip(found, wanted, strict=True)
            )
            totals[1] += sum(b.double().square().sum() for b in wanted)
            labels = target(batch)
            classes = len(wanted) == 1 and wanted[0].dim() == 2
            labelled &= classes and isinstance(labels, Tensor) and labels.shape == wanted[0].shape[:1]
            if classes:
                guesses = [t[0].argmax(1) for t in (wanted, found)]
                totals[2] += (guesses[0] == guesses[1]).sum()
                totals[3] += len(guesses[0])
                if labelled:
                    totals[4:] += torch.stack([(guess == labels).sum() for guess in guesses])
    apart, size, agreeing, count, right_old, right_new = totals.tolist()
    if not size:
        raise SurgeryError("the loader gave no data, or the old model gives only zeros")
    return Closeness(
        (apart / size) ** 0.5,
        agreeing / count if count else None,
        (right_old / count, right_new / count) if count and labelled else None,
    )
