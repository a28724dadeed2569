"""What ``convert`` did to each batch norm, and why it did not do more."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Change:
    """One batch norm of a model.

    Attributes:
        layer: its name in ``model.named_modules()``.
        before: its class before.
        after: its class after.
        fused: what is computed in the same pass now, such as ``"residual + relu"``; empty for nothing.
        where: the module whose ``forward`` was rewritten for that; ``""`` is the model itself.
        reason: why nothing (more) was fused, or why the layer was left as it was.
    """

    layer: str
    before: str
    after: str
    fused: str = ""
    where: str | None = None
    reason: str = ""

    @property
    def folded(self) -> str:
        """``fused``, by its name in version 0.1.0."""
        return self.fused

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Read a pickle, one of version 0.1.0 too."""
        vars(self).update({"fused" if name == "folded" else name: value for name, value in state.items()})


@dataclass
class ConversionReport:
    """What was done to each batch norm of a model, in the model's order; ``str()`` of it is a table."""

    to: str
    changes: list[Change] = field(default_factory=list)

    @property
    def fused(self) -> list[Change]:
        """The layers that compute more than a batch norm now."""
        return [change for change in self.changes if change.fused]

    @property
    def left(self) -> list[Change]:
        """The layers whose class is what it was, although another was asked for."""
        return [change for change in self.changes if change.before == change.after]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; ``folded`` is ``fused`` by its name in version 0.1.0."""
        changes = [{**asdict(change), "folded": change.fused} for change in self.changes]
        return {"to": self.to, "changes": changes}

    def __str__(self) -> str:
        head = ("layer", "before", "after", "fused", "reason")
        rows = [(c.layer or "(model)", c.before, c.after, c.fused or "-", c.reason) for c in self.changes]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(5)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in (head, *rows)
        ]
        changed = sum(c.before != c.after for c in self.changes)
        lines.append(
            f"{len(self.changes)} batch norms: {changed} changed class, "
            f"{len(self.fused)} compute what follows them"
        )
        return "\n".join(lines)
