"""Decide what folds into what, and for everything else, why not."""

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field

from torch import nn
from torch.nn.utils import parametrize

from ..graph.hooks import hook_on
from ..graph.record import Call, Forward, Recording, Value
from .affine import Affine, NotExactError, fold_before
from .find import Arrival, Linear, Norm, Stop, describe, find_linears, find_norms, follow


@dataclass(eq=False)
class Fold:
    """The map of ``norms`` goes into ``linear``, or into the last of the norms."""

    how: str  # "after": norms come after linear; "before": before it; "merged": norms into their last
    norms: list[Norm]
    affine: Affine
    linear: Linear | None = None
    reason: str = ""  # for "merged": why it was not folded further

    @property
    def into(self) -> str:
        """The path of what the map goes into."""
        return self.norms[-1].name if self.linear is None else self.linear.path


@dataclass
class FoldPlan:
    """What to do, and what was left: each norm is in exactly one of the two."""

    folds: list[Fold] = field(default_factory=list)
    left: dict[Norm, str] = field(default_factory=dict)
    order: list[Norm] = field(default_factory=list)  # as they ran


class Planner:
    """Finds what folds in a ``Recording``.

    ``model`` is the copy that was recorded; ``hooked`` names the parameters of the original that carry a
    gradient hook, which a copy loses.
    """

    def __init__(self, model: nn.Module, recording: Recording, hooked: Container[str] = ()) -> None:
        self.model, self.recording, self.hooked = model, recording, hooked
        self.linears = find_linears(recording)
        self.norms = {norm.call: norm for norm in find_norms(recording, model)}
        self.starts = {id(norm.data): norm for norm in self.norms.values() if norm.kind == "affine"}
        self.ran = Counter(forward.module for forward in recording.forwards)
        self.ends = {*self.linears, *self.norms, *(u for n in self.norms.values() for u in n.data.users)}
        # Of a norm: the linear operation before it, or why none is.
        self.before: dict[Norm, Linear] = {}
        self.not_before: dict[Norm, str] = {}
        # The norm or linear operation after it, or why none is.
        self.next: dict[Norm, Norm] = {}
        self.after: dict[Norm, tuple[Linear, Arrival]] = {}
        self.not_after: dict[Norm, str] = {}

    def plan(self) -> FoldPlan:
        """Group successive norms, and fold each group into what comes before it, or after it, or into one."""
        for linear in self.linears.values():
            self._look_ahead(linear)
        for norm in self.norms.values():
            self._look_on(norm)
        plan = FoldPlan(order=list(self.norms.values()))
        for norms in self._groups():
            self._decide(norms, plan)
        return plan

    # What meets what

    def _norm_at(self, arrival: Arrival) -> Norm | None:
        found = self.norms.get(arrival.call) or self.starts.get(id(arrival.value))
        return found if found is not None and found.data is arrival.value else None

    def _look_ahead(self, linear: Linear) -> None:
        """Find the norm that reads what ``linear`` gives."""
        value = linear.call.outputs[0]
        arrival = follow(value, linear.axis, self.ends)
        if isinstance(arrival, Stop):
            for norm in self._readers(value):
                self.not_before.setdefault(norm, f"the output of {linear.path} {arrival.reason}")
            return
        reader = self._norm_at(arrival)
        if reader is None:
            return
        if arrival.axis != 1:
            why = f"the features of {linear.path} lie on dimension {arrival.axis}"
            self.not_before[reader] = f"it normalises dimension 1, and {why}"
        elif arrival.repeat != 1:
            why = f"a group of {arrival.repeat} features of {linear.path}"
            self.not_before[reader] = f"each of its channels is {why}"
        elif why := self._unsafe(linear) or self._undecided(linear.call.forward, reader.forward):
            self.not_before[reader] = why
        else:
            self.before[reader] = linear

    def _look_on(self, norm: Norm) -> None:
        """Find the norm or linear operation that reads what ``norm`` gives."""
        if norm.tail or self._repeated(norm):
            return
        arrival = follow(norm.output, 1, self.ends)
        if isinstance(arrival, Stop):
            self.not_after[norm] = f"its own output {arrival.reason}"
            return
        reader = self._norm_at(arrival)
        if reader is not None:
            if (
                arrival.axis == 1
                and arrival.repeat == 1
                and not self._undecided(norm.forward, reader.forward)
            ):
                self.next[norm] = reader
            return
        linear = self.linears.get(arrival.call)
        if linear is None or linear.data is not arrival.value:
            self.not_after[norm] = f"its own output goes into {describe(arrival.call)}"
            return
        axis = len(arrival.value.shape) - 1 - linear.op.spatial
        if arrival.axis != axis or (linear.op.spatial and arrival.repeat != 1):
            why = f"{linear.path} reads its channels as something else than input features"
        else:
            why = self._unsafe(linear) or self._undecided(linear.call.forward, norm.forward)
        if why:
            self.not_after[norm] = why
        else:
            self.after[norm] = (linear, arrival)

    def _readers(self, value: Value, depth: int = 0) -> list[Norm]:
        """Norms that read this value, directly or through a few more calls: for the reason's sake only."""
        found = []
        for call in value.users:
            norm = self.norms.get(call)
            if norm is not None:
                found.append(norm)
            elif depth < 4 and call not in self.linears and len(call.data) == 1:
                for output in call.outputs:
                    found += self._readers(output, depth + 1)
        return found

    # Safety

    def _repeated(self, norm: Norm) -> str:
        module = self.model.get_submodule(norm.path)
        times = self.ran[module]
        direct = [other for other in self.norms.values() if other.name == norm.name]
        if max(times, len(direct)) > 1:
            return f"it is called {max(times, len(direct))} times"
        return ""

    def _unsafe(self, linear: Linear) -> str:
        """Why this operation's weight may not change; empty if it may."""
        name, module = linear.path, linear.call.forward.module
        if parametrize.is_parametrized(module) and linear.weight.origin != "state":
            return f"a parametrisation computes the weight of {name}"
        if linear.weight.origin != "state":
            return f"the weight of {name} is computed at each call, not stored"
        if self.ran[module] > 1 and len(linear.weight.users) > 1:
            return f"{name} is called {self.ran[module]} times with the same weight"
        for state in (linear.weight, linear.bias):
            if state is None:
                continue
            what = f"the {'weight' if state is linear.weight else 'bias'} of {name}"
            if state.origin != "state":
                return f"{what} is computed at each call, not stored"
            others = [user for user in state.users if user is not linear.call]
            if others:
                return f"{what} is also used by {describe(others[0])}"
            if any(held in self.hooked for held in state.names):
                return f"a hook on {what}"
        hook = hook_on(module)
        return (
            f"{hook} on {name}"
            if hook and linear.weight.names[0].startswith(linear.call.forward.path)
            else ""
        )

    def _undecided(self, one: Forward, other: Forward) -> str:
        """Say if the forward that holds both decides on data: on another input they may not meet."""
        mine = set(one.outwards())
        common = next((forward for forward in other.outwards() if forward in mine), None)
        if common is None or not common.reads:
            return ""
        where = common.path or "the model's forward"
        read = common.reads.strip("_")
        return f"Python reads a tensor's value ({read}) inside {where}: another input may take another branch"

    # Decisions

    def _groups(self) -> list[list[Norm]]:
        """Group norms that follow one another."""
        free = {n for n in self.norms.values() if n.affine is not None and not self._repeated(n)}
        following = {a: b for a, b in self.next.items() if a in free and b in free}
        groups = []
        for first in self.norms.values():
            if first in following.values():
                continue
            group = [first]
            while group[-1] in following:
                group.append(following[group[-1]])
            groups.append(group)
        return groups

    def _decide(self, norms: list[Norm], plan: FoldPlan) -> None:
        """Fold a group of norms, or say why it is left."""
        first, last = norms[0], norms[-1]
        repeated = self._repeated(first)
        if first.affine is None or repeated:
            plan.left[first] = first.why if first.affine is None else repeated
            return
        affine = first.affine
        for norm in norms[1:]:
            assert norm.affine is not None
            affine = affine.then(norm.affine)
        linear = self.before.get(first)
        reason = self._source(first) if linear is None else _misfit(linear, affine)
        if linear is not None and not reason:
            plan.folds.append(Fold("after", norms, affine, linear))
            return
        reasons = [reason]
        if last in self.after:
            linear, arrival = self.after[last]
            wide = affine.repeated(arrival.repeat)
            reason = _inexact(linear, wide)
            if not reason:
                plan.folds.append(Fold("before", norms, wide, linear))
                return
            reasons.append(reason)
        elif last.tail:
            reasons.append("its activation, residual or pool comes before what follows")
        elif last in self.not_after:
            reasons.append(self.not_after[last])
        why = "; ".join(dict.fromkeys(reasons))
        if len(norms) > 1:
            plan.folds.append(Fold("merged", norms, affine, reason=why))
        elif first.kind != "affine":
            plan.left[first] = why

    def _source(self, norm: Norm) -> str:
        """Why no linear operation before a norm can take its map."""
        if norm in self.not_before:
            return self.not_before[norm]
        producer: Call | None = norm.data.producer
        if producer is not None:
            return f"its input comes from {describe(producer)}, not from a convolution or Linear"
        given = norm.data in self.recording.forwards[0].inputs
        return "its input is the model's input" if given else "what computes its input cannot be seen"


def _misfit(linear: Linear, affine: Affine) -> str:
    assert linear.weight.tensor is not None
    channels = linear.op.out_channels(linear.weight.tensor)
    if channels == affine.channels:
        return ""
    return f"it has {affine.channels} channels, and {linear.path} gives {channels}"


def _inexact(linear: Linear, affine: Affine) -> str:
    assert linear.weight.tensor is not None
    try:
        fold_before(linear.op, linear.weight.tensor, None, affine)
    except NotExactError as error:
        return f"before {linear.path}: {error}"
    return ""
