"""Fold batch norms into the convolutions and Linears beside them, prove it, and say what was left and why."""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..accelerate.chain import attach_chains
from ..accelerate.packed import unavailable
from ..errors import SurgeryError, UsageError
from ..graph.record import watch
from .affine import NotExactError
from .apply import apply
from .find import Norm, is_known_norm
from .pack import layouts, packed_copy
from .plan import Plan, Planner, Step, describe_step, traces
from .report import FoldedLayer, FoldReport
from .verify import TOLERANCE, Errors, Inputs, Judge, Search, copied, detached

__all__ = ["FoldReport", "FoldedLayer", "fold"]


def fold(
    model: nn.Module,
    example: Any,
    *,
    tolerance: float | None = None,
    memory_format: torch.memory_format | None = None,
    pack: bool | None = None,
) -> nn.Module:
    """Return an evaluation-mode copy of ``model`` with its batch norms folded away; ``model`` is not touched.

    Pairs are found from what flows when the model runs on ``example``. Each fold is exact algebra in
    float64, rounded once to the weight's dtype; then the outputs are compared with the original's on the
    example and on random inputs, and a fold that moves them beyond ``tolerance`` is taken back. What stays
    is one multiply-add per channel.

    Args:
        model: any module; it may be in training mode.
        example: what the model takes: a tensor, a tuple of positional arguments or a dict of keyword
            arguments, on
            the model's device, of a batch size and resolution it will serve.
        tolerance: allowed relative difference (largest difference over largest magnitude of an output); by
            default
            1e-5 for float32, 1e-10 for float64, 2e-2 for float16, 1e-1 for bfloat16.
        memory_format: store weights so: ``torch.channels_last`` makes most convolutional networks faster on a
            CPU, whatever the layout of their input.
        pack: serve float32 on the CPU from weights kept in the order that they are computed in as well, each
            convolution and Linear computing the activation (and a convolution the 2x2 mean) behind it;
            ``PackedConv2d`` says more. None: where the output keeps its strides; True: also where it becomes
            channels_last; False: nowhere.

    Returns:
        The folded model, in evaluation mode, with a ``fold_report`` (``FoldReport``). Its parameters are new
        tensors.

    Raises:
        UsageError: the example is of the wrong kind.
        SurgeryError: the model cannot be copied or does not run on the example, or is not deterministic.

    Ioffe & Szegedy 2015, Algorithm 2, line 11; Jacob et al. 2018, section 3.2.
    """
    inputs = as_inputs(example)
    if tolerance is not None and not tolerance > 0:
        raise UsageError(f"tolerance must be above zero, not {tolerance}")
    original, plan, evidence = _study(model, inputs)
    try:
        judge = Judge(original, inputs)
    except SurgeryError:
        raise
    except Exception as error:
        raise SurgeryError(f"the model does not run on the example: {_first_line(error)}") from error
    limit = tolerance if tolerance is not None else _tolerance(original)
    trial = _Trial(original, plan, judge, limit, memory_format)
    search: Search[Step] = Search(trial.wrong)
    sound = search.sound(plan.steps)
    back = {plan.steps[i]: why for i, why in search.refused.items()}
    folded, errors = trial.result(sound)
    if not judge.accepts(errors, limit):
        # Not one fold is left to blame: the multiply-adds that stayed differ. The plain copy is always right.
        folded, back = original, {**back, **dict.fromkeys(sound, "the model moved beyond tolerance")}
        sound, errors = [], judge.measure(original, judge.twin)
    packing = _pack(folded, judge, errors, limit, pack)
    packing.model.fold_report = FoldReport(  # type: ignore[assignment]
        _layers(plan, sound, back), errors.example, errors.random, packing.error, errors.original,
        limit, evidence, "float64" if judge.double else "its own dtype", packing.layers, packing.reason,
    )  # fmt: skip
    return packing.model


def as_inputs(example: Any) -> Inputs:
    """Positional and keyword arguments from an example."""
    if isinstance(example, torch.Tensor):
        return detached(((example,), {}))
    if isinstance(example, tuple | list):
        return detached((tuple(example), {}))
    if isinstance(example, dict) and all(isinstance(key, str) for key in example):
        return detached(((), dict(example)))
    kind = type(example).__name__
    raise UsageError(f"example must be a tensor, a tuple of arguments or a dict of keyword ones, not {kind}")


def _study(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Plan, str]:
    """Copy the model, watch the copy run, and plan."""
    inner = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    hooked = {name for name, p in inner.named_parameters(remove_duplicate=False) if p._backward_hooks}
    try:
        original = copied(inner).eval()
    except Exception as error:
        raise SurgeryError(f"the model cannot be copied: {_first_line(error)}") from error
    try:
        args, kwargs = copy.deepcopy(inputs)
        flow = watch(original, args, kwargs, is_known_norm)
    except Exception as error:
        raise SurgeryError(f"the model does not run on the example: {_first_line(error)}") from error
    return original, Planner(original, flow, hooked).plan(), "graph" if traces(original) else "example"


class _Trial:
    """Builds the model with some of the steps and measures it; remembers the last one that passed."""

    def __init__(
        self,
        original: nn.Module,
        plan: Plan,
        judge: Judge,
        limit: float,
        memory_format: torch.memory_format | None,
    ) -> None:
        self.original, self.plan, self.judge, self.limit = original, plan, judge, limit
        self.memory_format = memory_format
        self.passed: tuple[list[Step], nn.Module, Errors] | None = None

    def build(self, model: nn.Module, steps: list[Step]) -> nn.Module:
        """Return a folded copy of ``model``: the original, or its float64 twin."""
        gone = {norm for step in steps for norm in step.norms}
        stay = [norm for step in self.plan.steps for norm in step.norms if norm not in gone]
        folded = apply(model, steps, [*self.plan.left, *stay])
        if self.memory_format is not None:
            folded.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        return folded

    def wrong(self, steps: list[Step]) -> str:
        """Build and measure; return what is wrong, or nothing."""
        try:
            folded = self.build(self.original, steps)
            exact = self.build(self.judge.twin, steps)
        except NotExactError as error:
            return str(error)
        try:
            errors = self.judge.measure(folded, exact)
        except Exception as error:  # the model's own code runs here: whatever it raises, the fold goes back
            return f"the folded model does not run: {_first_line(error)}"
        if self.judge.accepts(errors, self.limit):
            self.passed = (steps, folded, errors)
            return ""
        worst = max(errors.example, errors.random, errors.native)
        return f"the model's output moved by {worst:.1e} relative, over {self.limit:.0e}"

    def result(self, steps: list[Step]) -> tuple[nn.Module, Errors]:
        """Return the model of these steps and its distances."""
        if self.passed is None or self.passed[0] != steps:
            folded = self.build(self.original, steps)
            return folded, self.judge.measure(folded, self.build(self.judge.twin, steps))
        return self.passed[1], self.passed[2]


@dataclass(frozen=True)
class _Packing:
    """The model to hand out, its distance in its own dtype, what is packed in it or why nothing is."""

    model: nn.Module
    error: float
    layers: tuple[str, ...] = ()
    reason: str = ""


def _pack(folded: nn.Module, judge: Judge, errors: Errors, limit: float, wanted: bool | None) -> _Packing:
    """Pack the folded model if asked to, and take it back if it does not answer as the folded one does."""
    plain = partial(_Packing, folded, errors.native, ())
    if wanted is False:
        return plain("pack=False was asked for")
    if unavailable():
        return plain(unavailable())
    example = judge.inputs[0]
    try:
        packed, layers = packed_copy(folded, example)
        if not layers:
            return plain("it has no convolution or Linear that can be")
        attach_chains(packed)
        distance = judge.native_error(packed)
        moved = wanted is None and layouts(packed, example) != layouts(folded, example)
    except Exception as error:  # the model's own code runs here: whatever it raises, the plain one ships
        return plain(f"the packed model does not run: {_first_line(error)}")
    if not distance <= 2 * errors.original + limit:
        return plain(f"the model's output moved by {distance:.1e} relative")
    if moved:
        return plain("the strides of the output would change; pack=True packs all the same")
    return _Packing(packed, distance, layers)


def _layers(plan: Plan, sound: list[Step], back: dict[Step, str]) -> tuple[FoldedLayer, ...]:
    found: dict[Norm, FoldedLayer] = {
        n: FoldedLayer(n.name, "left", reason=why) for n, why in plan.left.items()
    }
    for step in plan.steps:
        for norm in step.norms:
            found[norm] = _layer(norm, step, back.get(step))
    return tuple(found[norm] for norm in plan.order if norm in found)


def _layer(norm: Norm, step: Step, wrong: str | None) -> FoldedLayer:
    if wrong is not None:
        return FoldedLayer(norm.name, "taken back", describe_step(step), step.how, wrong)
    if step.how != "merged":
        return FoldedLayer(norm.name, "folded", describe_step(step), step.how)
    if norm is step.norms[-1]:
        return FoldedLayer(norm.name, "left", reason=step.reason)
    return FoldedLayer(norm.name, "merged", describe_step(step), "before", step.reason)


def _tolerance(model: nn.Module) -> float:
    kinds = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    return max((TOLERANCE.get(kind, 1e-5) for kind in kinds), default=1e-5)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
