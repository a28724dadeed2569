"""Compare a converted model with the one it was made from, and take back what makes them differ.

Both run on the example and on inputs like it, in evaluation and, where the kind promises the same there, in
training mode, from the same random state. Compared are all tensors of the outputs, the gradients of inputs
and parameters, the buffers, and the random states afterwards. What the runs change is put back.
"""

import copy
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from ..errors import SurgeryError
from ..graph.record import Inputs, as_inputs, map_tensors, tensors_in
from ..stats.preserve import preserved, uncompiled
from ..text import first_line
from .pending import WATCHERS, Pending

_NOISY = 16  # times what rounding does to a model
_SHARE = 0.05  # of a gradient's size at most, where others are as noisy
_NOTHING = 256  # units in the last place of a module's largest gradient
_GRADIENT = "the gradient of "
# Sums in another order, in a deep network; relative to the largest value of a tensor.
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


class Part(NamedTuple):
    """Something that was changed in the converted model, and how to undo it and do it again."""

    module: Module
    undo: Callable[[], None]
    redo: Callable[[], None]


class Verified(NamedTuple):
    """The modules that were changed back, and why; and what joined each layer's calls, as it was seen."""

    taken_back: dict[Module, str]
    seen: dict[Module, str]


def verify(model: Module, twin: Module, example: Any, training: bool, parts: list[Part]) -> Verified:
    """Undo the parts with which ``twin`` gives something else than ``model``.

    Args:
        model: the one that was converted; it is left as it is.
        twin: what became of it.
        example: what to call both with.
        training: whether the two do the same in training mode too.
        parts: what may be undone, each for itself.

    Raises:
        SurgeryError: the model does not run on the example, or they differ even with every part undone.
    """
    cases = _cases(model, as_inputs(example), (False, True) if training else (False,))

    def wrong() -> str:
        for case in cases:
            mode = case.training
            try:
                found = case.difference(_observed(twin, case.inputs, mode), model)
            except Exception as error:  # the model's own code may raise anything
                found = f"it fails: {first_line(error)}"
            if found:
                return f"{found} in {'training' if mode else 'evaluation'} mode"
        return ""

    first = wrong()
    refused: list[Part] = []
    if first:
        refused = _take_back(parts, wrong)
    rest = first and wrong()
    if rest:
        raise SurgeryError(f"the converted model gives other outputs on the example: {rest}")
    why = {part.module: f"taken back: with it, {first}" for part in refused}
    return Verified(why, _seen(twin, cases))


def _seen(twin: Module, cases: "list[_Case]") -> dict[Module, str]:
    """What joined the calls of each layer, in training if that was compared; where calls differ, the most."""
    seen: dict[Module, str] = {}

    def watch(pending: Pending) -> None:
        if pending.layer is not None:
            seen[pending.layer] = max(seen.get(pending.layer, ""), str(pending), key=len)

    WATCHERS.append(watch)
    try:
        for case in sorted(cases, key=lambda case: not case.training)[:1]:
            _observed(twin, case.inputs, case.training)
    finally:
        WATCHERS.remove(watch)
    return seen


@dataclass
class _Case:
    """Inputs, the mode, and what the model gives and does with them."""

    inputs: Inputs
    training: bool
    expected: list[tuple[str, Tensor]]
    noise: dict[str, float] | None = None

    def difference(self, found: list[tuple[str, Tensor]], model: Module) -> str:
        """The first thing that differs by more than rounding does in this model; measured where one does."""
        said = _difference(found, self.expected)
        if said and self.noise is None:
            self.noise = _noise(model, self)
        return said and _difference(found, self.expected, self.noise)


def _cases(model: Module, inputs: Inputs, modes: tuple[bool, ...]) -> list[_Case]:
    """What the model gives in each mode on its example and on inputs like it, if always the same."""
    cases: list[_Case] = []
    for i, given in enumerate((inputs, *_like(inputs))):
        for mode in modes:
            try:
                expected = _observed(model, given, mode)
                if i or not _difference(_observed(model, given, mode), expected):
                    cases.append(_Case(given, mode, expected))
            except Exception as error:
                if i == 0 and not mode:
                    raise SurgeryError(
                        f"the given model fails on the example: {first_line(error)}; example= is a tensor, "
                        "a tuple of arguments or a dict of keyword arguments"
                    ) from error
    return cases


def _take_back(parts: list[Part], wrong: Callable[[], str]) -> list[Part]:
    """Undo the parts that make a difference, found by halving; all others stay."""
    for part in parts:
        part.undo()
    if wrong():
        return parts
    refused: list[Part] = []

    def redo(some: list[Part]) -> None:
        for part in some:
            part.redo()
        if not some or not wrong():
            return
        for part in reversed(some):
            part.undo()
        if len(some) == 1:
            refused.extend(some)
            return
        middle = len(some) // 2
        redo(some[:middle])
        redo(some[middle:])

    redo(parts)
    return refused


# --- inputs like the example ------------------------------------------------------------------------------


def _like(inputs: Inputs) -> Iterator[Inputs]:
    """The same samples in another order, and half as large; no values that are not in the example."""

    def flipped(tensor: Tensor) -> Tensor:
        return tensor.flip(0) if tensor.dim() > 1 and tensor.shape[0] > 1 else tensor

    def halved(tensor: Tensor) -> Tensor:
        return tensor * 0.5 if tensor.is_floating_point() else tensor

    yield map_tensors(inputs, flipped)
    yield map_tensors(inputs, halved)


def _noise(model: Module, case: _Case) -> dict[str, float]:
    """How far rounding may move each named tensor.

    It puts activations on the other side of their corners, anywhere: gradients may all be off by the largest
    share. And a gradient that is next to nothing beside its module's others (of a bias before a batch norm:
    0) is all rounding.
    """
    moved = _nudged_run(model, case)
    floating = [(n, t, float(t.abs().max())) for n, t in case.expected if t.is_floating_point() and t.numel()]
    largest: dict[str, float] = defaultdict(float)  # among the tensors of a module
    for name, _, size in floating:
        module = name.rpartition(".")[0]
        largest[module] = max(largest[module], size)
    allowed, share = {}, 0.0
    for name, t, size in floating:
        other = moved.get(name, t)
        gap = float((t.double() - other.double()).abs().max()) if other.shape == t.shape else math.inf
        gap = gap if math.isfinite(gap) else 0.0
        nothing = _NOTHING * torch.finfo(t.dtype).eps * largest[name.rpartition(".")[0]]
        gradient = name.startswith(_GRADIENT)
        allowed[name] = max(_NOISY * gap, nothing if gradient and size <= nothing else 0.0)
        if gradient and size > nothing:
            share = max(share, gap / size)
    for name, _, size in floating:
        if name.startswith(_GRADIENT):
            allowed[name] = max(allowed[name], min(_NOISY / 4 * share, _SHARE) * size)
    return allowed


def _nudged_run(model: Module, case: _Case) -> dict[str, Tensor]:
    """The model's run with weights and inputs moved by a few units in their last place."""
    generator = torch.Generator("cpu").manual_seed(1)

    def nudged(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        sign = torch.randint(0, 2, tensor.shape, generator=generator, device="cpu").to(tensor) * 2 - 1
        return tensor * (1 + 4 * torch.finfo(tensor.dtype).eps * sign)

    try:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.copy_(nudged(parameter))
        return dict(_observed(other, map_tensors(case.inputs, nudged), case.training))
    except Exception:  # the model's own code may raise anything
        return {}


_NO_GRADIENTS = "the failure of the backward pass"


# --- a run and all that it did ----------------------------------------------------------------------------


def _observed(model: Module, inputs: Inputs, training: bool) -> list[tuple[str, Tensor]]:
    """What a run gives and does, as named tensors."""
    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(uncompiled())
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 (the global one is what models draw from)
        model.train(training)
        leaves: list[Tensor] = []
        args, kwargs = map_tensors(inputs, lambda t: _given(t, leaves))
        outputs = model(*args, **kwargs)
        found = [(f"output {i}", t) for i, t in enumerate(tensors_in(outputs))]
        seen = [(name, _copied(t)) for name, t in found]
        seen += [(f"{name}'s need of a gradient", _number(t.requires_grad)) for name, t in found]
        seen += [(f"the buffer {n}", _copied(b)) for n, b in model.named_buffers()]
        drawn = float(torch.rand((), device="cpu")) + random.random() + float(np.random.rand())  # noqa: NPY002
        seen.append(("what is drawn next", _number(drawn)))
        return seen + _gradients(model, [t for _, t in found], leaves)


def _number(value: float) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64, device="cpu")


def _given(tensor: Tensor, leaves: list[Tensor]) -> Tensor:
    """A copy to call a model with, which it may write into; what it is a copy of is added to ``leaves``."""
    copied = tensor.detach().clone()
    if not tensor.is_floating_point() or tensor.dim() < 2:
        return copied
    leaves.append(copied.requires_grad_())
    return copied.clone()


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone() if not tensor.is_sparse else tensor.detach().to_dense()


def _gradients(model: Module, outputs: list[Tensor], inputs: list[Tensor]) -> list[tuple[str, Tensor]]:
    """The gradients of inputs and parameters, of a sum that weighs each value of the outputs differently."""
    goals = [t for t in outputs if t.requires_grad and t.is_floating_point() and t.numel()]
    named: list[tuple[str, Tensor]]
    named = [(f"{_GRADIENT}{n}", p) for n, p in model.named_parameters() if p.requires_grad]
    named += [(f"{_GRADIENT}input {i}", t) for i, t in enumerate(inputs) if t.requires_grad and t.is_leaf]
    if not goals or not named:
        return []
    generator = torch.Generator("cpu").manual_seed(0)
    weights = [torch.rand(t.shape, generator=generator, device="cpu").to(t) + 0.5 for t in goals]
    try:
        found = torch.autograd.grad(goals, [t for _, t in named], weights, allow_unused=True)
    except RuntimeError:  # the model's own code changed something that its gradient needs
        return [(_NO_GRADIENTS, _number(0))]
    return [(name, g.detach()) for (name, _), g in zip(named, found, strict=True) if g is not None]


def _difference(
    found: list[tuple[str, Tensor]], expected: list[tuple[str, Tensor]], noise: dict[str, float] | None = None
) -> str:
    """The first thing that differs, in words."""
    if expected and expected[-1][0] == _NO_GRADIENTS:
        expected = expected[:-1]
        found = found[: len(expected)]
    if [name for name, _ in found] != [name for name, _ in expected]:
        return "it gives other outputs or gradients"
    for (name, a), (_, b) in zip(found, expected, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{name} has another shape or dtype"
        if _close(a, b, (noise or {}).get(name, 0.0)):
            continue
        # An activation on the other side of its corner changes a few values of a gradient, the whole little.
        whole = noise is not None and name.startswith(_GRADIENT)
        if not (whole and float((a - b).norm()) <= _TOLERANCE.get(b.dtype, 1e-3) * float(b.norm())):
            return f"{name} differs"
    return ""


def _close(a: Tensor, b: Tensor, noise: float = 0.0) -> bool:
    if not (a.is_floating_point() or a.is_complex()):
        return bool(torch.equal(a, b))
    tolerance = _TOLERANCE.get(a.dtype, 1e-3)
    a, b = (t.double() if t.is_floating_point() else t for t in (a, b))
    finite = b[b.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    return bool(torch.allclose(a, b, rtol=0.0, atol=max(tolerance * max(size, 1e-6), noise), equal_nan=True))
