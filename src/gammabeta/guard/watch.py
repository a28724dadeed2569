"""``watch``: the guard itself, its clock and what it is allowed to touch.

Nothing that it does changes a number of the training. It reads buffers; hooks on PyTorch's own norms stand
for single steps and return nothing; our norms get none, since hooked layers leave the quicker paths.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from ..arguments import check_model
from ..doctor.evidence import BatchSize, Evidence
from ..doctor.finding import Finding
from ..doctor.static import held_layers, read_layers, read_sequences
from ..errors import GammabetaError, UsageError
from ..graph.layers import unwrap
from ..nn.layer import Fused
from ..text import visible
from .batches import Batches, first_tensor, run_check
from .ranks import CAUSE, FIX, alone, apart, gather, world
from .reading import Reading, batch_between, kept_norms, read
from .rules import IDLE, Course

if TYPE_CHECKING:
    from ..doctor.collect import LossFn

CLOSE, OPEN, SPARSE = 4, 49, 32  # every 4th step is read until the 49th, every 32nd then; two in a row
WRITTEN = 4
SETTINGS = ("eps", "momentum", "partly-frozen", "tracking-toggled", "half-precision-buffers")
VALUES = ("invalid-statistics", "exploding-variance", "dead-gamma")
OF_HELD = ("eval-mutates", "batch-dependence")
SEVERITY = ("error", "warning")


class GuardError(GammabetaError, RuntimeError):
    """The guard found a fault, and was told to stop the training for it."""


@dataclass(frozen=True)
class Noticed:
    """A fault, and the optimiser's step (from 1) after which the evidence sufficed."""

    step: int
    finding: Finding
    layers: tuple[str, ...]

    def __str__(self) -> str:
        """One line: what happened, where, the number that shows it, what mends it."""
        found = self.finding
        more = f" and {len(self.layers) - 1} more" if len(self.layers) > 1 else ""
        where = (found.layer or "the model") + more
        return visible(
            f"step {self.step}: {found.severity} {found.check} in {where}: {found.evidence}."
            f" Cause: {found.cause}. Fix: {found.fix}"
        )


def to_stderr(noticed: Noticed) -> None:
    """Tell in a line on standard error."""
    print(f"gammabeta guard: {noticed}", file=sys.stderr)


def watch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    held: Iterable[Any] | None = None,
    loss: "LossFn | None" = None,
    tell: Callable[[Noticed], object] = to_stderr,
    on: Literal["tell", "error"] = "tell",
    ranks: bool = False,
) -> "Guard":
    """Watch the batch normalization of ``model`` while it is trained, and say what goes wrong, once each.

    Convert the model first, then watch it. The guard reads buffers at some steps: in pairs, every fourth step
    until step 49 and every 32nd then. The training is bitwise the same with it and without it.

    Example::

        with gb.watch(model, optimizer) as guard:
            for x, y in loader:
                ...
        print(guard.noticed)

    Args:
        model: as it is called in the loop, ``DistributedDataParallel`` and ``torch.compile`` included.
        optimizer: its steps are the guard's clock; None: call ``guard.step()`` after each, or else each
            forward pass in training counts as one.
        held: a few batches that do not change, ``(input, target)``: after steps 25, 50, 100, 200 and so on
            the doctor compares training and evaluation on them. That costs about a dozen passes over them.
        loss: ``loss(output, target)``, for ``held``.
        tell: is called with each :class:`Noticed`; by default it is one line on standard error.
        on: "error" raises :class:`GuardError` at an error or a warning, from the optimiser's step.
        ranks: under ``torch.distributed``: gather the running statistics that nothing makes equal
            (not synchronised, ``broadcast_buffers=False`` or no DDP), after steps 17, 49, 128, 256 and so on.
            Every rank must watch then, with the same optimiser's steps.

    Raises:
        UsageError: another ``on``; ``held`` is empty, or given without ``ranks`` where there are several.

    The checks are the doctor's; docs/design/guard.md says which, and what each step costs.
    """
    check_model("watch", model)
    if optimizer is not None and not hasattr(optimizer, "register_step_post_hook"):
        raise UsageError(
            f"watch: optimizer is {type(optimizer).__name__}; give a torch.optim.Optimizer, or None"
        )
    if on not in ("tell", "error"):
        raise UsageError(f"on is 'tell' or 'error', not {on!r}")
    kept = None if held is None else list(held)
    if kept is not None and not kept:
        raise UsageError("held has no batches: give a few, or None")
    if kept and world() > 1 and not ranks:
        raise UsageError("held makes the ranks wait for each other: watch on every rank, and say ranks=True")
    return Guard(model, optimizer, partial(_say, tell, on), kept, loss, ranks)


def _say(tell: Callable[[Noticed], object], on: str, noticed: Noticed) -> None:
    tell(noticed)
    if on == "error":
        raise GuardError(str(noticed))


class Guard:
    """What :func:`watch` returns. ``noticed`` has what was found, in order; ``close`` ends the watch."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        tell: Callable[[Noticed], object],
        held: list[Any] | None,
        loss: "LossFn | None",
        gathers: bool,
    ) -> None:
        self.noticed: list[Noticed] = []
        self.steps = 0
        self._model, self._inner, self._tell = model, unwrap(model), tell
        self._held, self._loss, self._gathers = held, loss, gathers
        self._norms = kept_norms(self._inner)
        self._layers = list(self._norms.values())
        self._courses = [Course(name, layer, i) for i, (name, layer) in enumerate(self._norms.items())]
        self._always_held = held_layers(self._inner)
        self._batches = Batches()
        self._old: Reading | None = None
        self._forwards = self._in_step = 0  # passes in training since the last reading, and in this step
        self._spoken: set[tuple[str, str]] = set()  # code and cause
        self._before: set[tuple[str, str]] = set()  # code and layer: so when the watch began
        self._ends: list[Callable[[], object]] = []
        self._probes: list[Callable[[], object]] = []
        self._in_backward: set[str] = set()
        self._first_input: tuple[Tensor, int] | None = None
        self._idle_since: int | None = None
        self._gaps = self._written = 0
        self._busy = False
        self._clocked = optimizer is not None
        self._around = read_sequences(self._inner)
        if self._layers:
            self._attach(optimizer)
            self._probe()

    def _attach(self, optimizer: torch.optim.Optimizer | None) -> None:
        if optimizer is not None:
            self._ends.append(optimizer.register_step_post_hook(lambda *_: self.step()).remove)
        with suppress(RuntimeError):  # a ScriptModule may refuse
            hook = self._model.register_forward_pre_hook(self._entered, with_kwargs=True)
            self._ends.append(hook.remove)
        self._alone = alone(self._model, self._norms)
        if isinstance(self._model, nn.parallel.DistributedDataParallel) and not self._gathers:
            what = "broadcast_buffers=False, and the layer is not synchronised"
            found = partial(Finding, "warning", what, CAUSE, FIX, check="rank-divergence")
            self._notice(found(layer=name) for name in self._alone)

    # The clock

    def step(self) -> None:
        """The optimiser has taken a step; called by a hook of the optimiser, where one was given."""
        self._clocked = True
        self._advance()

    def _advance(self) -> None:
        if self._busy or not self._layers:
            return
        self.steps += 1
        self._clear_probes()
        if self._gathers and self._alone and self._gathers_at(self.steps):
            with self._working():  # before what may raise on one rank only
                everyone = gather(list(self._alone.values()), self.steps)
                self._notice(apart(everyone, list(self._alone)))
        if self._reads(self.steps):
            with self._working():
                self._look()
        if self._held is not None and self._compares(self.steps):
            with self._working():
                self._compare()
        self._in_step, self._first_input = 0, None
        if self._is_close(self.steps + 1):
            self._probe()

    def close(self) -> None:
        """End the watch: no hook stays."""
        self._clear_probes()
        while self._ends:
            self._ends.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @staticmethod
    def _every(step: int) -> int:
        return CLOSE if step <= OPEN else SPARSE

    def _reads(self, step: int) -> bool:
        return step % self._every(step) < 2

    def _is_close(self, step: int) -> bool:
        """Whether the batches and calls of this step are looked at."""
        return step % self._every(step) == 1

    @staticmethod
    def _gathers_at(step: int) -> bool:
        """Nothing that one rank alone sees may decide this: it would wait for the others for ever."""
        return step in (17, OPEN) or step % 128 == 0

    @staticmethod
    def _compares(step: int) -> bool:
        return step % 25 == 0 and (step // 25).bit_count() == 1

    @contextmanager
    def _working(self) -> Iterator[None]:
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    # What is seen

    def _entered(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before a forward pass of the model."""
        if self._busy or not self._model.training:
            return
        learns = torch.is_grad_enabled()
        if not self._clocked and learns and self._in_step:
            self._advance()
        if self._old is not None and self._old.step == self.steps and not self._in_step:
            self._compare_with(self._old)
        self._forwards += learns
        self._in_step += learns
        if self._is_close(self.steps + 1):
            x = first_tensor((*args, *kwargs.values()))
            if x is not None:
                self._see(x)

    def _compare_with(self, old: Reading) -> None:
        """Whether other code has written the buffers since they were read, and no update was counted."""
        new = read(self._layers, self.steps)
        pairs = zip((*old.mean, *old.var), (*new.mean, *new.var), strict=True)
        written = new.counts == old.counts and not all(_same(*pair) for pair in pairs)
        self._written = self._written + 1 if written else 0
        if self._written >= WRITTEN:
            finding = Finding(
                "warning",
                f"after each of {WRITTEN} steps looked at, other code wrote the running statistics",
                "load_state_dict, a moving average or a broadcast that also writes buffers, each step",
                "let it write parameters only; or recalibrate at the end",
                check="never-updated",
            )
            self._notice([finding])

    def _see(self, x: Tensor) -> None:
        if x.requires_grad:
            return  # another network's output, which changes as that one learns
        if self._first_input is None:
            self._first_input = x, x._version  # held, so that its memory is no other batch's meanwhile
            with self._working(), torch.no_grad():
                self._batches.see_input(x)
        elif x.data_ptr() == self._first_input[0].data_ptr() and _alike(x, *self._first_input):
            finding = Finding(
                "warning",
                "the same batch goes through the model twice in a step, in training mode",
                "a second pass for a metric, or an optimiser that looks twice (sharpness-aware ones do)",
                "run the second pass with model.eval(), or with momentum set to 0 for the norms",
                check="double-update",
            )
            self._notice([finding])

    def _probe(self) -> None:
        """Look at each call of PyTorch's own norms for one step."""
        if getattr(self._model, "_orig_mod", None) is not None or self._inner._compiled_call_impl is not None:
            return  # a compiled graph would be made anew for a hook
        for name, layer in self._norms.items():
            if not isinstance(layer, Fused):
                hook = layer.register_forward_pre_hook(partial(self._called, name))
                self._probes.append(hook.remove)

    def _called(self, name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if self._busy or not layer.training or not args or not isinstance(args[0], Tensor):
            return
        if torch._C._current_graph_task_id() != -1:
            self._in_backward.add(name)
        x = args[0]
        if x.dim() > 1 and x.shape[1]:
            sizes = self._batches.values.setdefault(name, Counter())
            sizes[BatchSize(x.shape[0], x.numel() // x.shape[1])] += 1

    def _clear_probes(self) -> None:
        while self._probes:
            self._probes.pop()()

    # What is made of it

    def _look(self) -> None:
        new, old = read(self._layers, self.steps), self._old
        self._old, forwards, self._forwards = new, self._forwards, 0
        found = list(self._twice())
        if old is None:
            for course in self._courses:
                course.begin(new, self._model.training)
        else:
            found += [f for course in self._courses for f in course.look(old, new, forwards)]
            found += self._asleep(old, new)
            if new.step == old.step + 1 and self._small():
                self._see_layers(old, new)
        if self.steps in (1, 17, 33, OPEN) or self.steps % 128 == 0 or not all(map(_finite, new.mean)):
            found += self._ask_doctor()
        self._notice(found)

    def _see_layers(self, old: Reading, new: Reading) -> None:
        for course in self._courses:
            seen = batch_between(course.layer, old, new, course.index)
            if seen is not None and bool(seen.var.isfinite().all()):
                self._batches.see_layer(course.name, seen)

    def _small(self) -> bool:
        return bool(self._batches.sizes) and min(self._batches.sizes) < 8

    def _twice(self) -> Iterator[Finding]:
        names, self._in_backward = sorted(self._in_backward), set()
        for name in names:
            yield Finding(
                "warning",
                "the running statistics change during the backward pass",
                "activation checkpointing runs the layer's forward again, and updates again",
                "convert to gammabeta.nn layers, which skip the second update, or use 1 - sqrt(1 - momentum)",
                check="double-update",
                layer=name,
            )

    def _asleep(self, old: Reading, new: Reading) -> Iterator[Finding]:
        """The model fell into evaluation while the optimiser goes on."""
        awake = any(new.training) or self._model.training
        if awake or not any(course.trained for course in self._courses):
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = old.step
        elif new.step - self._idle_since >= IDLE and _learns(self._layers):
            yield Finding(
                "warning",
                f"the model has been in evaluation mode since step {self._idle_since}, and still learns:"
                " no running statistic changes",
                "eval() for a validation, and no train() after it",
                "call model.train() before the training goes on",
                check="partly-frozen",
            )

    def _ask_doctor(self) -> Iterator[Finding]:
        """The doctor's own checks of what a model shows without being run."""
        layers = read_layers(self._inner, self._always_held)
        evidence = Evidence(layers, self._around, model_training=self._inner.training)
        for code in SETTINGS:
            yield from run_check(code, evidence)
        for code in VALUES:  # what a trained model came with is no fault of this training
            findings = list(run_check(code, evidence))
            if self.steps == 1:
                self._before |= {(f.check, f.layer) for f in findings}
            yield from (f for f in findings if (f.check, f.layer) not in self._before)
        yield from self._batches.findings(evidence, world())

    def _compare(self) -> None:
        """Training and evaluation on the batches held back; a gap must show itself twice in a row."""
        from ..doctor.diagnosis import diagnose  # with all that its report needs: not at the start

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                report = diagnose(self._inner, self._held, loss=self._loss)
            except GammabetaError:
                raise
            except Exception:  # whatever the model makes of held batches is for `diagnose` to say
                self._held = self._held if self._gathers else None  # other ranks may wait for the next time
                return
        self._notice(f for f in report.findings if f.check in OF_HELD)
        gap = [f for f in report.findings if f.check == "train-eval-gap" and f.severity == "error"]
        self._gaps = self._gaps + 1 if gap else 0
        if self._gaps > 1:
            self._notice(gap)

    def _notice(self, findings: Iterable[Finding]) -> None:
        """Speak of each fault once: the first layer for all of them."""
        fresh: dict[tuple[str, str], list[Finding]] = {}
        for finding in findings:
            key = (finding.check, finding.cause)
            if finding.severity in SEVERITY and key not in self._spoken:
                fresh.setdefault(key, []).append(finding)
        self._spoken |= set(fresh)
        for found in fresh.values():
            noticed = Noticed(self.steps, found[0], tuple(finding.layer for finding in found))
            self.noticed.append(noticed)
            self._tell(noticed)


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _alike(x: Tensor, first: Tensor, version: int) -> bool:
    """Whether these are the same numbers: of the same shape, and not written since."""
    return x.shape == first.shape and x._version == version


def _same(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _learns(layers: list[Any]) -> bool:
    return any(p.requires_grad for layer in layers for p in (layer.weight, layer.bias) if p is not None)
