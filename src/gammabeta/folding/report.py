"""What a fold did, layer by layer: an object, a table, JSON."""

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class FoldedLayer:
    """One batch norm of the model and what became of it.

    ``outcome``: "folded" (gone; its map is in ``into``), "merged" (its map is in the batch norm ``into``),
    "left" (one multiply-add stays) or "taken back" (folded, found wrong, undone). ``how``: "after" (it came
    after ``into``) or "before". ``reason``: why it was left or taken back.
    """

    name: str
    outcome: str
    into: str = ""
    how: str = ""
    reason: str = ""


@dataclass(frozen=True)
class FoldReport:
    """Every batch norm that ran, and how far the folded model's output is from the original's.

    ``error`` and ``random_error``: the largest difference over the largest magnitude, worst output, of the
    same folds made in a float64 copy of the model (``arithmetic``), on the example and on random inputs.
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
    def left(self) -> tuple[FoldedLayer, ...]:
        """The layers that stay: undone folds, and layers that never folded."""
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
            rows.append((layer.name, layer.outcome, detail))
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """One line: how many folded, and how exactly."""
        error = max(self.error, self.random_error)
        packed = f"; {len(self.packed)} layers packed" if self.packed else ""
        return (
            f"{len(self.folded)} of {len(self.layers)} folded; relative error {error:.0e} in "
            f"{self.arithmetic}, {self.native_error:.0e} as shipped "
            f"(the original: {self.original_error:.0e}); flow from the {self.evidence}{packed}"
        )

    def __str__(self) -> str:
        return self.table()
