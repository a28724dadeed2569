"""Decide what folds into what, and for everything else, why not."""

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..graph.record import Call, Flow, Frame, Value
from .affine import Affine, NotExactError, fold_before
from .find import Linear, Norm, find_linears, find_norms
from .follow import Break, Link, describe, follow


@dataclass(eq=False)
class Step:
    """One fold: the map of ``norms`` goes into ``linear``, or into the last of the norms."""

    how: str  # "after": norms come after linear; "before": before it; "merged": norms into their last
    norms: list[Norm]
    affine: Affine
    linear: Linear | None = None
    reason: str = ""  # for "merged": why it went no further


@dataclass
class Plan:
    """What to do, and what was left: each norm is in exactly one of the two."""

    steps: list[Step] = field(default_factory=list)
    left: dict[Norm, str] = field(default_factory=dict)
    order: list[Norm] = field(default_factory=list)  # as they ran


class Planner:
    """Pairs found in a ``Flow``.

    ``model`` is the copy that was watched; ``hooked`` names the parameters of the original that carry a
    gradient hook, which a copy loses.
    """

    def __init__(self, model: nn.Module, flow: Flow, hooked: Container[str] = ()) -> None:
        self.model, self.flow, self.hooked = model, flow, hooked
        self.linears = find_linears(flow)
        self.norms = {norm.call: norm for norm in find_norms(flow, model)}
        self.starts = {id(norm.data): norm for norm in self.norms.values() if norm.kind == "affine"}
        self.ran = Counter(frame.module for frame in flow.frames)
        self.ends = {*self.linears, *self.norms, *(u for n in self.norms.values() for u in n.data.users)}

    def plan(self) -> Plan:
        """Make chains of norms, and fold each into what comes before it, or after it, or into one."""
        before: dict[Norm, Linear] = {}
        lost: dict[Norm, str] = {}
        for linear in self.linears.values():
            self._look_ahead(linear, before, lost)
        nexts: dict[Norm, Norm] = {}
        after: dict[Norm, tuple[Linear, Link]] = {}
        refused: dict[Norm, str] = {}
        for norm in self.norms.values():
            self._look_on(norm, nexts, after, refused)
        plan = Plan(order=list(self.norms.values()))
        for chain in self._chains(nexts, before):
            self._settle(chain, before, lost, after, refused, plan)
        return plan

    # Links -------------------------------------------------------------------------------------------------

    def _norm_at(self, link: Link) -> Norm | None:
        found = self.norms.get(link.call) or self.starts.get(id(link.value))
        return found if found is not None and found.data is link.value else None

    def _look_ahead(self, linear: Linear, before: dict[Norm, Linear], lost: dict[Norm, str]) -> None:
        """Find the norm that reads what ``linear`` gives."""
        value = linear.call.outputs[0]
        link = follow(value, linear.axis, self.ends)
        if isinstance(link, Break):
            for norm in self._readers(value):
                lost.setdefault(norm, f"the output of {linear.path} {link.reason}")
            return
        reader = self._norm_at(link)
        if reader is None:
            return
        if link.axis != 1 or link.repeat != 1:
            lost[reader] = (
                f"it normalises dimension 1, and the features of {linear.path} lie on dimension {link.axis}"
                if link.axis != 1
                else f"each of its channels is a group of {link.repeat} features of {linear.path}"
            )
            return
        why = self._unsafe(linear) or self._undecided(linear.call.frame, reader.frame)
        if why:
            lost[reader] = why
        else:
            before[reader] = linear

    def _look_on(
        self,
        norm: Norm,
        nexts: dict[Norm, Norm],
        after: dict[Norm, tuple[Linear, Link]],
        refused: dict[Norm, str],
    ) -> None:
        """Find the norm or linear operation that reads what ``norm`` gives."""
        if norm.tail or self._repeated(norm):
            return
        link = follow(norm.output, 1, self.ends)
        if isinstance(link, Break):
            refused[norm] = f"its own output {link.reason}"
            return
        reader = self._norm_at(link)
        if reader is not None:
            if link.axis == 1 and link.repeat == 1 and not self._undecided(norm.frame, reader.frame):
                nexts[norm] = reader
            return
        linear = self.linears.get(link.call)
        if linear is None or linear.data is not link.value:
            refused[norm] = f"its own output goes into {describe(link.call)}"
            return
        axis = len(link.value.shape) - 1 - linear.op.spatial
        if link.axis != axis or (linear.op.spatial and link.repeat != 1):
            refused[norm] = f"{linear.path} reads its channels as something else than input features"
            return
        why = self._unsafe(linear) or self._undecided(linear.call.frame, norm.frame)
        if why:
            refused[norm] = why
        else:
            after[norm] = (linear, link)

    def _readers(self, value: Value, depth: int = 0) -> list[Norm]:
        """Norms that read this value, directly or through a few more calls: for the reason's sake only."""
        found = []
        for call in value.users:
            norm = self.norms.get(call)
            if norm is not None:
                found.append(norm)
            elif depth < 4 and call not in self.linears and len(call.data) == 1 and len(value.users) > 0:
                for output in call.outputs:
                    found += self._readers(output, depth + 1)
        return found

    # Safety ------------------------------------------------------------------------------------------------

    def _repeated(self, norm: Norm) -> str:
        module = self.model.get_submodule(norm.path)
        times = self.ran[module]
        direct = [other for other in self.norms.values() if other.name == norm.name]
        if max(times, len(direct)) > 1:
            return f"it is called {max(times, len(direct))} times"
        return ""

    def _unsafe(self, linear: Linear) -> str:
        """Why this operation's weight may not change; empty if it may."""
        name, module = linear.path, linear.call.frame.module
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
        if module._forward_pre_hooks and linear.weight.names[0].startswith(linear.call.frame.path):
            return f"a forward pre-hook on {name}"
        return ""

    def _undecided(self, one: Frame, other: Frame) -> str:
        """Tell of a decision on data in the forward that holds both: on another input they may not meet."""
        mine = set(one.chain())
        common = next((frame for frame in other.chain() if frame in mine), None)
        if common is None or not common.reads:
            return ""
        where = common.path or "the model's forward"
        read = common.reads.strip("_")
        return f"Python reads a tensor's value ({read}) inside {where}: another input may go another way"

    # Decisions ---------------------------------------------------------------------------------------------

    def _chains(self, nexts: dict[Norm, Norm], before: dict[Norm, Linear]) -> list[list[Norm]]:
        """Group norms that follow one another into chains."""
        free = {n for n in self.norms.values() if n.affine is not None and not self._repeated(n)}
        links = {a: b for a, b in nexts.items() if a in free and b in free}
        heads = [norm for norm in self.norms.values() if norm not in set(links.values())]
        chains = []
        for head in heads:
            chain = [head]
            while chain[-1] in links:
                chain.append(links[chain[-1]])
            chains.append(chain)
        return chains

    def _settle(
        self,
        chain: list[Norm],
        before: dict[Norm, Linear],
        lost: dict[Norm, str],
        after: dict[Norm, tuple[Linear, Link]],
        refused: dict[Norm, str],
        plan: Plan,
    ) -> None:
        head, last = chain[0], chain[-1]
        if head.affine is None:
            plan.left[head] = head.why
            return
        repeated = self._repeated(head)
        if repeated:
            plan.left[head] = repeated
            return
        affine = head.affine
        for norm in chain[1:]:
            assert norm.affine is not None
            affine = affine.then(norm.affine)
        if head in before and not (reason := self._misfit(before[head], affine)):
            plan.steps.append(Step("after", chain, affine, before[head]))
            return
        reasons = [reason if head in before else lost.get(head) or self._source(head)]
        if last in after:
            linear, link = after[last]
            wide = affine.repeated(link.repeat)
            reason = self._inexact(linear, wide)
            if not reason:
                plan.steps.append(Step("before", chain, wide, linear))
                return
            reasons.append(reason)
        elif last.tail:
            reasons.append("its activation, residual or pool comes before what follows")
        elif last in refused:
            reasons.append(refused[last])
        why = "; ".join(dict.fromkeys(reasons))
        if len(chain) > 1:
            plan.steps.append(Step("merged", chain, affine, reason=why))
        elif head.kind != "affine":
            plan.left[head] = why

    def _misfit(self, linear: Linear, affine: Affine) -> str:
        assert linear.weight.tensor is not None
        channels = linear.op.out_channels(linear.weight.tensor)
        if channels != affine.channels:
            return f"it has {affine.channels} channels, and {linear.path} gives {channels}"
        return ""

    def _inexact(self, linear: Linear, affine: Affine) -> str:
        assert linear.weight.tensor is not None
        try:
            fold_before(linear.op, linear.weight.tensor, None, affine)
        except NotExactError as error:
            return f"before {linear.path}: {error}"
        return ""

    def _source(self, norm: Norm) -> str:
        producer: Call | None = norm.data.producer
        if producer is None:
            return (
                "its input is the model's input"
                if norm.data in self._given()
                else "its input's making is unseen"
            )
        return f"its input comes from {describe(producer)}, not from a convolution or Linear"

    def _given(self) -> list[Value]:
        return self.flow.frames[0].inputs


def describe_step(step: Step) -> str:
    """Say where the map of a step went."""
    if step.linear is None:
        return step.norms[-1].name
    return step.linear.path


def traces(model: nn.Module) -> bool:
    """Tell whether torch.fx traces the model: then every input flows as the example does."""
    from torch.fx import Graph, Tracer

    from .find import is_known_norm

    class NormTracer(Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return is_known_norm(m) or super().is_leaf_module(m, module_qualified_name)

    try:
        with torch.no_grad():
            return isinstance(NormTracer().trace(model), Graph)
    except Exception:  # a model's own code, run on symbols: whatever it raises, it did not trace
        return False
