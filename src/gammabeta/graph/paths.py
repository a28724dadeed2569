"""Whether two modules meet on every path through a model, as far as its source tells.

A run shows that the output of one module went into another. Another input, argument or method may part them.
They surely meet if they stand next to each other in a ``Sequential``, or if each place in the source that
reaches one of them is followed by one that reaches the other (``method.py``).
"""

from itertools import pairwise

from torch.nn import Module, Sequential

from .method import Method, branch_in, is_called_as_module, is_plain, is_steady, unlike
from .reach import Mention, Reach
from .source import NotReadable, read


class Paths:
    """What the methods of a model's modules reach, read once."""

    def __init__(self, model: Module) -> None:
        self.parents: dict[Module, list[Module]] = {}
        for module in model.modules():
            for child in module.children():
                self.parents.setdefault(child, []).append(module)
        self.reach = Reach(model)

    def part(self, giver: Module, reader: Module) -> str:
        """Why the output of ``giver`` may not go into ``reader`` on some path; empty if it surely does."""
        if giver is reader:
            return "" if is_plain(giver) else branch_in(giver)
        why = unlike(giver, gives=True) or unlike(reader, gives=False)
        if why:
            return why
        mine, theirs = self._outwards(giver), self._outwards(reader)
        common = next((m for m in mine if m in theirs), None)
        if common is None or common in (giver, reader):
            return "another path may reach one without the other"
        up, down = mine[: mine.index(common)], theirs[: theirs.index(common)]
        why = self._reached_otherwise(common, [*up, *down])
        for chain, last in ((up, True), (down, False)):
            for inner, outer in pairwise(chain):
                why = why or self._at_the_end(inner, outer, last=last)
        if why:
            return why
        if _runs_in_order(common):
            return self._adjacent(common, up[-1], down[-1])
        return self._in_code(common, up[-1], down[-1])

    def _outwards(self, module: Module) -> list[Module]:
        """The module and those it lies in, innermost first."""
        found = [module]
        while found[-1] in self.parents:
            outer = self.parents[found[-1]][0]
            if outer in found:
                break
            found.append(outer)
        return found

    def _reached_otherwise(self, common: Module, chain: list[Module]) -> str:
        """Whether code that is not seen, or code elsewhere, may reach a part of the way."""
        if any(len(self.parents[module]) > 1 or module in self.reach.held for module in chain):
            return "one of them is held in several places"
        for module in chain:
            outer = self.parents[module][0]
            name = next(n for n, child in outer._modules.items() if child is module)
            if name in self.reach.loose:
                return f"other code takes {name!r} from what may be {type(outer).__name__}"
        for outer in {common, *(self.parents[module][0] for module in chain)}:
            if outer in self.reach.hidden or "forward" in vars(outer):
                return f"the code of {type(outer).__name__} reaches its modules in ways that are not seen"
            if any(m in self.reach.opened for m in self._outwards(outer)):
                return f"{type(outer).__name__} is handed to code that is not seen"
        return ""

    def _places(self, module: Module) -> list[Mention]:
        return self.reach.mentions.get(module, [])

    def _whole(self, sequential: Module) -> str:
        if all(place.called for place in self._places(sequential)):
            return ""
        return f"the parts of {type(sequential).__name__} are also reached by other code"

    def _at_the_end(self, inner: Module, outer: Module, *, last: bool) -> str:
        """Why ``inner`` may not be the last (or first) that ``outer`` runs."""
        part = f"{type(outer).__name__} may reach one without the other"
        if not is_called_as_module(outer):
            return part
        if _runs_in_order(outer):
            ordered = list(outer.children())
            at_end = bool(ordered) and ordered[-1 if last else 0] is inner and not self._places(inner)
            return self._whole(outer) if at_end else part
        places = self._places(inner)
        try:
            source = read(type(outer).forward)
        except NotReadable:
            return part
        if len(places) != 1 or not places[0].called or places[0].source is not source:
            return part
        method = Method(outer, source)
        return method.gives(places[0].node) if last else method.takes(places[0].node)

    def _adjacent(self, common: Module, first: Module, second: Module) -> str:
        if self._places(first) or self._places(second):
            return "one of them is also reached by its place in the Sequential"
        ordered = list(common.children())
        between = ordered[ordered.index(first) + 1 : ordered.index(second)]
        if ordered.index(first) > ordered.index(second):
            return "they are called in another order"
        unsteady = next((m for m in between if not is_steady(m)), None)
        if unsteady is not None:
            return f"{type(unsteady).__name__} stands between, and may do something else"
        return self._whole(common)

    def _in_code(self, common: Module, first: Module, second: Module) -> str:
        """Both are called in methods of ``common``: each call of one must belong to one call of the other."""
        name = type(common).__name__
        places = [self._places(module) for module in (first, second)]
        if any(m.owner is not common or not m.called for found in places for m in found):
            return f"the code of {name} also reaches one of them in another way"
        if not all(places):
            return f"the code of {name} does not show where it calls one of them"
        strict = max(map(len, places)) > 1  # a run shows what stands between in one of the places only
        free = list(places[1])
        why = ""
        for one in places[0]:
            same = [other for other in free if other.source is one.source]
            if not same:
                return f"they are called in different methods of {name}"
            for other in same:
                why = Method(common, one.source).carries(one.node, other.node, strict=strict)
                if not why:
                    free.remove(other)
                    break
            else:
                return why
        return f"the code of {name} also calls one of them alone" if free else ""


def _runs_in_order(module: Module) -> bool:
    kind = type(module)
    plain = isinstance(module, Sequential) and "forward" not in vars(module)
    return plain and kind.forward is Sequential.forward and kind.__iter__ is Sequential.__iter__  # type: ignore[attr-defined]
