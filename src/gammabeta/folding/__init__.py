"""Fold batch norms into the convolutions and Linears beside them, verify it, report what stays and why."""

import copy
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from ..accelerate.chain import attach_chains
from ..accelerate.packed import unavailable
from ..arguments import check_model
from ..errors import SurgeryError, UsageError
from ..graph.layers import batch_norm_layers, scripted_norms, unwrap
from ..graph.record import Inputs, as_inputs, record
from ..stats.preserve import preserved, remember_random_state, uncompiled
from ..text import first_line, visible
from .affine import NotExactError
from .apply import apply
from .find import Norm, flows_alike, is_known_norm
from .guard import guard
from .pack import layouts, packed_copy
from .plan import Fold, FoldPlan
from .verify import Errors, Verifier, copied, default_tolerance, search

__all__ = ["FoldReport", "FoldedLayer", "fold"]

# --- the report -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoldedLayer:
    """One batch norm of the model and what became of it.

    ``outcome``: "folded" (gone; its map is in ``into``), "merged" (its map is in the batch norm ``into``),
    "guarded" (it is there, and folded at each call where the output of ``into`` goes into it), "left" (one
    multiply-add stays) or "taken back" (folded, found wrong, undone). ``how``: "after" (it came after
    ``into``) or "before". ``reason``: why it was left or taken back, or why it is only guarded.
    """

    name: str
    outcome: str
    into: str = ""
    how: str = ""
    reason: str = ""


@dataclass(frozen=True)
class FoldReport:
    """Every batch norm of the model, run or not, and how far the folded model is from the original.

    ``error`` and ``random_error``: the largest difference over the largest magnitude, worst output, of the
    same folds made in a float64 copy of the model (``arithmetic``), on the example and on
    inputs like it.
    ``native_error``: of the folded model as it is, its weights rounded, in its own dtype, against the
    original in float64. ``original_error``: the original's own, in its own dtype. ``evidence``: "graph"
    (torch.fx traces the model, so every input flows this way) or "example" (the flow is the one seen on the
    example). ``packed``: the layers that serve from reordered weights; ``unpacked``: why there are none.
    """

    layers: tuple[FoldedLayer, ...]
    error: float
    random_error: float
    native_error: float
    original_error: float
    tolerance: float
    evidence: str
    arithmetic: str
    packed: tuple[str, ...] = ()
    unpacked: str = ""

    @property
    def folded(self) -> tuple[FoldedLayer, ...]:
        """The layers that are gone."""
        return tuple(layer for layer in self.layers if layer.outcome in ("folded", "merged"))

    @property
    def guarded(self) -> tuple[FoldedLayer, ...]:
        """The layers that are folded at the calls that allow it; so they cost nothing on the example."""
        return tuple(layer for layer in self.layers if layer.outcome == "guarded")

    @property
    def left(self) -> tuple[FoldedLayer, ...]:
        """The layers that stay, taken back or never folded."""
        return tuple(layer for layer in self.layers if layer.outcome in ("left", "taken back"))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return asdict(self)

    def to_json(self) -> str:
        """JSON text, indented."""
        return json.dumps(self.to_dict(), indent=2)

    def table(self) -> str:
        """Aligned text: one line a layer, and a summary."""
        rows = [("layer", "outcome", "into / reason")]
        for layer in self.layers:
            detail = f"{layer.how} {layer.into}".strip() if not layer.reason else layer.reason
            if layer.outcome == "merged":
                detail = f"into {layer.into}" + (f" ({layer.reason})" if layer.reason else "")
            rows.append((visible(layer.name), layer.outcome, visible(detail)))
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """One line: how many folded, and how exactly."""
        error = max(self.error, self.random_error)
        packed = f"; {len(self.packed)} layer{'s' * (len(self.packed) != 1)} packed" if self.packed else ""
        guarded = f", {len(self.guarded)} guarded" if self.guarded else ""
        done = f"{len(self.folded)} of {len(self.layers)} folded" if self.layers else "no batch norm to fold"
        return (
            f"{done}{guarded}; relative error {error:.0e} in "
            f"{self.arithmetic}, {self.native_error:.0e} as shipped "
            f"(the original: {self.original_error:.0e}); flow from the {self.evidence}{packed}"
        )

    def __str__(self) -> str:
        return self.table()


# --- fold -------------------------------------------------------------------------------------------------


def fold(
    model: nn.Module,
    example: Any,
    *,
    tolerance: float | None = None,
    memory_format: torch.memory_format | None = None,
    pack: bool | None = None,
) -> nn.Module:
    """Return an evaluation-mode copy of ``model`` with its batch norms folded; ``model`` does not change.

    Pairs are found by running the model on ``example`` and recording what follows what. Each fold is exact
    algebra in float64, rounded once to the weight's dtype. Then the outputs are compared with the original's
    on the example and on inputs made of its samples (in another order, fewer, scaled), and a fold that moves
    them beyond ``tolerance`` is undone. A norm that may not always follow its layer is folded at each call
    in which it does (unless ``pack=False``). A norm that stays costs one multiply-add per channel.

    Args:
        model: any module; it may be in training mode.
        example: what the model takes: a tensor, a namedtuple or dataclass (one argument), a tuple of
            positional arguments or a dict of keyword arguments, on the model's device, of a batch size and
            resolution it will serve.
        tolerance: allowed relative difference (largest difference over largest magnitude of an output); by
            default 1e-5 for float32, 1e-10 for float64, 2e-2 for float16, 1e-1 for bfloat16.
        memory_format: the layout of the weights: ``torch.channels_last`` makes most convolutional networks
            faster on a CPU, whatever the layout of their input.
        pack: for float32 on the CPU, also keep weights in the order in which they are computed, and let each
            convolution and Linear compute the activation (a convolution also the 2x2 mean) that follows;
            ``PackedConv2d`` says more. None: if the output keeps its strides; True: also if it becomes
            channels_last; False: never, and nothing is guarded: layers are torch's, methods the model's.

    Returns:
        The folded model, in evaluation mode, with a ``fold_report`` (``FoldReport``). Its parameters are new
        tensors. ``torch.compile`` and ``DistributedDataParallel`` around it are left off.

    Raises:
        UsageError: the example is of the wrong kind.
        SurgeryError: the model cannot be copied or does not run on the example, or is not deterministic.

    Ioffe & Szegedy 2015, Algorithm 2, line 11; Jacob et al. 2018, section 3.2.
    """
    check_model("fold", model)
    put_back = remember_random_state(model)
    try:
        with plain_mode(), uncompiled():
            return _fold(model, as_inputs(example), tolerance, memory_format, pack)
    finally:
        put_back()


@contextmanager
def plain_mode() -> Iterator[None]:
    """What the caller has switched on must not enter what is made here: weights, copies, comparisons.

    Tensors made under ``inference_mode`` fail outside it and hide their changes; autocast rounds.
    """
    with torch.inference_mode(False), ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _fold(
    model: nn.Module,
    inputs: Inputs,
    tolerance: float | None,
    memory_format: torch.memory_format | None,
    pack: bool | None,
) -> nn.Module:
    if tolerance is not None and not tolerance > 0:
        raise UsageError(f"tolerance must be above zero, not {tolerance}")
    original, plan, evidence = _study(model, inputs)
    try:
        verifier = Verifier(original, inputs)
    except SurgeryError:
        raise
    except Exception as error:
        raise SurgeryError(f"the model does not run on the example: {first_line(error)}") from error
    limit = tolerance if tolerance is not None else default_tolerance(original)
    trial = _Trial(original, plan, verifier, limit, memory_format)
    sound, back = search(plan.folds, trial.wrong)
    folded, errors = trial.passed or trial.unfolded()
    if not errors.within(limit):
        # No single fold is wrong: the multiply-adds that stayed differ. The plain copy is always right.
        folded, back = original, {**back, **dict.fromkeys(sound, "the model moved beyond tolerance")}
        errors = verifier.measure(original, verifier.twin)
    arithmetic = "float64" if verifier.double else "its own dtype"
    report = FoldReport(_layers(plan, back), *errors, limit, evidence, arithmetic)
    if pack is not False and folded is not original:
        folded, report = _guarded(folded, report, trial, [f for f in plan.folds if f not in back])
    result, report = _packed(folded, report, verifier, pack)
    result.fold_report = report  # type: ignore[assignment]
    return result


def _study(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, FoldPlan, str]:
    """Copy the model, record a run of the copy, and plan."""
    inner = model if isinstance(model, nn.DataParallel) else unwrap(model)
    if isinstance(inner, torch.jit.ScriptModule):
        raise SurgeryError(f"{type(inner).__name__} is TorchScript; fold the model before it is scripted")
    hooked = {name for name, p in inner.named_parameters(remove_duplicate=False) if p._backward_hooks}
    try:
        original = copied(inner).eval()
    except Exception as error:
        raise SurgeryError(f"the model cannot be copied: {first_line(error)}") from error
    try:
        args, kwargs = copy.deepcopy(inputs)
        with preserved(original):
            before = _versions(original)
            recording = record(original, lambda: original(*args, **kwargs), is_known_norm)
            after = _versions(original)
    except Exception as error:
        raise SurgeryError(f"the model does not run on the example: {first_line(error)}") from error
    written = {name for name in before if after.get(name) != before[name]}
    plan = FoldPlan(original, recording, hooked, written)
    with preserved(original):
        alike = flows_alike(original)
    return original, plan, "graph" if alike else "example"


def _versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Which tensor stands under each name, and how often it was written."""
    state = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: (id(tensor), tensor._version) for name, tensor in state if not tensor.is_inference()}


@dataclass
class _Trial:
    """Builds the model with some of the folds and measures it; remembers the largest that passed."""

    original: nn.Module
    plan: FoldPlan
    verifier: Verifier
    limit: float
    memory_format: torch.memory_format | None
    passed: tuple[nn.Module, Errors] | None = None

    def build(self, model: nn.Module, folds: list[Fold], kept: Iterable[Norm] = ()) -> nn.Module:
        """Return a folded copy of ``model``, the original or its float64 twin; ``kept`` stay as they are."""
        gone = {*kept, *(norm for fold in folds for norm in fold.norms)}
        folded = apply(
            model,
            folds,
            [n for n in self.plan.norms.values() if n not in gone and not self.plan.is_written([n])],
        )
        if self.memory_format is not None:
            folded.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        return folded

    def measured(self, folds: list[Fold]) -> tuple[nn.Module, Errors]:
        """Return the model of these folds and its distances."""
        folded = self.build(self.original, folds)
        return folded, self.verifier.measure(folded, self.build(self.verifier.twin, folds))

    def unfolded(self) -> tuple[nn.Module, Errors]:
        """Return the model without folds: the plain copy where its code reads more of a norm than its map."""
        try:
            return self.measured([])
        except Exception:
            return self.original, self.verifier.measure(self.original, self.verifier.twin)

    def wrong(self, folds: list[Fold]) -> str:
        """Build and measure; return what is wrong, or nothing."""
        try:
            folded = self.build(self.original, folds)
            exact = self.build(self.verifier.twin, folds)
        except NotExactError as error:
            return str(error)
        try:
            errors = self.verifier.measure(folded, exact)
        except Exception as error:  # the model's own code may raise anything: the fold is undone
            return f"the folded model does not run: {first_line(error)}"
        if errors.within(self.limit):
            self.passed = folded, errors
            return ""
        worst = max(errors.example, errors.random, errors.native)
        return f"the model's output moved by {worst:.1e} relative, over {self.limit:.0e}"


def _guarded(
    folded: nn.Module, report: FoldReport, trial: _Trial, folds: list[Fold]
) -> tuple[nn.Module, FoldReport]:
    """Guard the norms that were left only because another path may part them from what is before them."""
    meetings = dict(trial.plan.meetings)
    if not meetings:
        return folded, report
    try:
        made = trial.build(trial.original, folds, meetings)
        guards = guard(made, meetings.items())
        distance = trial.verifier.native_error(made)
    except Exception:  # the model's own code may raise anything: it stays as it is
        return folded, report
    met = {norm.name: meetings[norm].path for norm, one in guards.items() if one.met}
    if not met or not distance <= 2 * report.original_error + report.tolerance:
        return folded, report
    layers = tuple(
        replace(layer, outcome="guarded", into=met[layer.name], how="after") if layer.name in met else layer
        for layer in report.layers
    )
    return made, replace(report, native_error=distance, layers=layers)


def _packed(
    folded: nn.Module, report: FoldReport, verifier: Verifier, wanted: bool | None
) -> tuple[nn.Module, FoldReport]:
    """Pack the folded model if wanted; undo it if the output differs from the folded model's."""

    def left(reason: str) -> tuple[nn.Module, FoldReport]:
        return folded, replace(report, unpacked=reason)

    if wanted is False:
        return left("pack=False was asked for")
    if unavailable():
        return left(unavailable())
    example = verifier.inputs[0]
    try:
        packed, layers = packed_copy(folded, example)
        if not layers:
            return left("it has no convolution or Linear that can be packed")
        attach_chains(packed)
        distance = verifier.native_error(packed)
        moved = wanted is None and layouts(packed, example) != layouts(folded, example)
    except Exception as error:  # the model's own code may raise anything: it is not packed
        return left(f"the packed model does not run: {first_line(error)}")
    if not distance <= 2 * report.original_error + report.tolerance:
        return left(f"the model's output moved by {distance:.1e} relative")
    if moved:
        return left("the strides of the output would change; pack=True packs all the same")
    return packed, replace(report, native_error=distance, packed=layers)


def _layers(plan: FoldPlan, back: dict[Fold, str]) -> tuple[FoldedLayer, ...]:
    """What became of each norm; ``back``: the folds that were undone, and why."""
    found = {norm: FoldedLayer(norm.name, "left", reason=why) for norm, why in plan.left.items()}
    for fold in plan.folds:
        found |= {norm: _layer(norm, fold, back.get(fold)) for norm in fold.norms}
    layers = [found[norm] for norm in plan.norms.values() if norm in found]
    ran = {norm.path for norm in plan.norms.values()} | plan.read
    idle = [name for name in batch_norm_layers(plan.model) if name not in ran]
    layers += [FoldedLayer(name, "left", reason="it did not run on the example") for name in idle]
    scripted = scripted_norms(plan.model)
    layers += [FoldedLayer(name, "left", reason="it is in TorchScript") for name in scripted]
    return tuple(layers)


def _layer(norm: Norm, fold: Fold, wrong: str | None) -> FoldedLayer:
    if wrong is not None:
        return FoldedLayer(norm.name, "taken back", fold.into, fold.how, wrong)
    if fold.how != "merged":
        return FoldedLayer(norm.name, "folded", fold.into, fold.how)
    if norm is fold.norms[-1]:
        return FoldedLayer(norm.name, "left", reason=fold.reason)
    return FoldedLayer(norm.name, "merged", fold.into, "before", fold.reason)
