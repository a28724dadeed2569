"""Decide what folds into what, and for everything else, why not."""

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass
from functools import reduce

from torch import nn
from torch.nn.utils import parametrize

from ..graph.layers import hook_on
from ..graph.paths import Paths
from ..graph.record import Recording, Value
from .affine import Affine, NotExactError, fold_before
from .find import Arrival, Linear, Norm, batch_norm_arguments, describe, find_linears, find_norms, follow


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


class FoldPlan:
    """What to do with each norm of a ``Recording``: it is in one of ``folds``, or ``left`` with the reason.

    ``model`` is the copy that was recorded; ``hooked`` names the parameters of the original that carry a
    gradient hook, which a copy loses.
    """

    def __init__(
        self, model: nn.Module, recording: Recording, hooked: Container[str], written: set[str]
    ) -> None:
        self.model, self.recording, self.hooked, self.written = model, recording, hooked, written
        self.linears = find_linears(recording)
        self.norms = {norm.call: norm for norm in find_norms(recording, model)}  # as they ran
        self.starts = {id(norm.data): norm for norm in self.norms.values() if norm.kind == "affine"}
        self.paths = Paths(model)
        self.ran = Counter(forward.module for forward in recording.forwards)
        self.ends = {*self.linears, *self.norms, *(u for n in self.norms.values() for u in n.data.users)}
        # What gives a norm its input, or why no linear operation does.
        self.before: dict[Norm, Linear | str] = {}
        self._uncertain: dict[Norm, Linear] = {}  # what gave one its input in the run, and may not always
        for linear in self.linears.values():
            self._look_before_norms(linear)
        # What reads a norm's output, with the number of features for each channel, or why neither does.
        self.after = {norm: self._reader(norm) for norm in self.norms.values()}
        self.folds: list[Fold] = []
        self.left: dict[Norm, str] = {}
        for norms in self._groups():
            self._decide(norms)

    @property
    def read(self) -> set[str]:
        """The modules whose running mean some call read, their own or another's."""
        means = [batch_norm_arguments(norm.call).get("running_mean") for norm in self.norms.values()]
        return {name.rpartition(".")[0] for m in means if isinstance(m, Value) for name in m.names}

    @property
    def meetings(self) -> list[tuple[Norm, Linear]]:
        """Norms that are left only as another path may lead elsewhere, and what stood before each."""
        return [
            (norm, linear)
            for norm, linear in self._uncertain.items()
            if norm in self.left and isinstance(norm.affine, Affine) and not self.is_written([norm])
        ]

    # What meets what

    def _norm_at(self, arrival: Arrival) -> Norm | None:
        found = self.norms.get(arrival.call) or self.starts.get(id(arrival.value))
        return found if found is not None and found.data is arrival.value else None

    def _look_before_norms(self, linear: Linear) -> None:
        """Note ``linear`` as what comes before the norm that reads its output, or why it does not."""
        value = linear.call.outputs[0]
        arrival = follow(value, linear.op.axis(value.shape), self.ends)
        if isinstance(arrival, str):
            for norm in self._readers(value):
                self.before.setdefault(norm, f"the output of {linear.path} {arrival}")
            return
        reader = self._norm_at(arrival)
        if reader is None:
            return
        if arrival.axis != 1:
            lie = f"the features of {linear.path} lie on dimension {arrival.axis}"
            why = f"it normalises dimension 1, and {lie}"
        elif arrival.repeat != 1:
            why = f"each of its channels is a group of {arrival.repeat} features of {linear.path}"
        else:
            unsafe = self._unsafe(linear)
            why = unsafe or self._undecided(linear, reader)
            if why and not unsafe:
                self._uncertain[reader] = linear
        self.before[reader] = why or linear

    def _reader(self, norm: Norm) -> Norm | tuple[Linear, int] | str:
        """The norm or linear operation that reads what ``norm`` gives, or why none can take its map."""
        if norm.tail:
            return "its activation, residual or pool comes before what follows"
        arrival = follow(norm.call.outputs[0], 1, self.ends)
        if isinstance(arrival, str):
            return f"its own output {arrival}"
        reader = self._norm_at(arrival)
        if reader is not None:
            plain = arrival.axis == 1 and arrival.repeat == 1
            return reader if plain and not self._undecided(norm, reader) else ""
        linear = self.linears.get(arrival.call)
        if linear is None or linear.data is not arrival.value:
            return f"its own output goes into {describe(arrival.call)}"
        expected = linear.op.axis(arrival.value.shape)
        if arrival.axis != expected or (linear.op.spatial and arrival.repeat != 1):
            return f"{linear.path} reads its channels as something else than input features"
        why = self._unsafe(linear) or self._undecided(norm, linear)
        return why or (linear, arrival.repeat)

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
        named = sum(other.name == norm.name for other in self.norms.values())
        times = max(self.ran[self.model.get_submodule(norm.path)], named)
        return f"it is called {times} times" if times > 1 else ""

    def _unsafe(self, linear: Linear) -> str:
        """Why this operation's weight may not change; empty if it may."""
        name, module = linear.path, linear.call.forward.module
        for state in (linear.weight, linear.bias):
            if state is None:
                continue
            is_weight = state is linear.weight
            what = f"the {'weight' if is_weight else 'bias'} of {name}"
            if state.origin != "state":
                if is_weight and parametrize.is_parametrized(module):
                    return f"a parametrisation computes {what}"
                return f"{what} is computed at each call, not stored"
            if any(held in self.written for held in state.names):
                return f"the model's own code writes {what} in its forward"
            others = [user for user in state.users if user is not linear.call]
            if others and is_weight and self.ran[module] > 1:
                return f"{name} is called {self.ran[module]} times with the same weight"
            if others:
                return f"{what} is also used by {describe(others[0])}"
            if any(held in self.hooked for held in state.names):
                return f"a hook on {what}"
        own = linear.weight.names[0].startswith(linear.call.forward.path)
        hook = hook_on(module) if own else ""
        return f"{hook} on {name}" if hook else ""

    def _undecided(self, giver: Norm | Linear, reader: Norm | Linear) -> str:
        """Say if the forward that holds both decides on data or its source may part them."""
        mine = set(giver.call.forward.outwards())
        common = next((forward for forward in reader.call.forward.outwards() if forward in mine), None)
        if common is None or not common.reads:
            return self.paths.part(self._module(giver), self._module(reader))
        where = common.path or "the model's forward"
        read = common.reads.strip("_")
        return f"Python reads a tensor's value ({read}) inside {where}: another input may take another branch"

    def _module(self, one: Norm | Linear) -> nn.Module:
        """The module that computes it, also where its ``forward`` was called directly."""
        return self.model.get_submodule(one.path) if isinstance(one, Norm) else one.call.forward.module

    def is_written(self, norms: list[Norm]) -> str:
        """Why the numbers of these norms may be others at the next call."""
        for norm in norms:
            read = [value for value in norm.call.read if value.origin == "state"]
            names = {name for value in read for name in value.names}
            if norm.call.module is not None:
                names |= {f"{norm.path}.{name}" for name, _ in norm.call.module.named_buffers()}
            written = {n for n in names & self.written if not n.endswith("num_batches_tracked")}
            if written:
                return f"the model's own code writes {min(written)} in its forward"
        return ""

    # Decisions

    def _groups(self) -> list[list[Norm]]:
        """Group norms that follow one another."""
        free = {n for n in self.norms.values() if isinstance(n.affine, Affine) and not self._repeated(n)}
        following = {
            norm: after
            for norm, after in self.after.items()
            if norm in free and isinstance(after, Norm) and after in free
        }
        groups = []
        for first in self.norms.values():
            if first in following.values():
                continue
            group = [first]
            while group[-1] in following:
                group.append(following[group[-1]])
            groups.append(group)
        return groups

    def _decide(self, norms: list[Norm]) -> None:
        """Fold a group of norms into what is before or after it, or into its last; or say why it is left."""
        first, last = norms[0], norms[-1]
        refused = first.affine if isinstance(first.affine, str) else self._repeated(first)
        refused = refused or self.is_written(norms)
        if refused:
            self.left[first] = refused
            return
        affine = reduce(Affine.then, [norm.affine for norm in norms if isinstance(norm.affine, Affine)])
        before, after = self.before.get(first), self.after[last]
        if isinstance(before, Linear):
            reason = _misfit(before, affine)
            if not reason:
                self.folds.append(Fold("after", norms, affine, before))
                return
        else:
            reason = before or self._source(first)
        reasons = [reason]
        if isinstance(after, tuple):
            linear, repeat = after
            wide = affine.repeated(repeat)
            reason = _inexact(linear, wide)
            if not reason:
                self.folds.append(Fold("before", norms, wide, linear))
                return
            reasons.append(reason)
        elif isinstance(after, str) and after:
            reasons.append(after)
        why = "; ".join(dict.fromkeys(reasons))
        if len(norms) > 1:
            self.folds.append(Fold("merged", norms, affine, reason=why))
        elif first.kind != "affine":
            self.left[first] = why

    def _source(self, norm: Norm) -> str:
        """Where a norm's input comes from, which is no linear operation."""
        producer = norm.data.producer
        if producer is not None:
            return f"its input comes from {describe(producer)}, not from a convolution or Linear"
        given = norm.data in self.recording.forwards[0].inputs
        return "its input is the model's input" if given else "what computes its input cannot be seen"


def _misfit(linear: Linear, affine: Affine) -> str:
    assert linear.weight.tensor is not None
    channels = linear.op.channels(linear.weight.tensor, linear.op.weight_axes[1])
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
