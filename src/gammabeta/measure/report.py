"""What ``benchmark`` found: a row for each way to run the model, and one sentence of advice."""

from dataclasses import asdict, dataclass
from typing import Any

TRAINING, TUNING, EVALUATION = "training step", "step with frozen statistics", "evaluation"
_GAIN = 1.03  # times as fast, from which on advice speaks of it
_LESS = 0.1  # of the memory, and at least
_WORTH = 1_000_000  # bytes


@dataclass(frozen=True)
class Row:
    """One way to run the model, beside the model as it is.

    Attributes:
        task: ``"training step"`` (forward, loss, backward), ``"step with frozen statistics"``,
            ``"evaluation"``.
        way: ``"as it is"``, ``"fused"``, ``"fused, recompute"``, ``"tune"``, ``"folded"``,
            ``"torch.compile"``, ``"ONNX Runtime"``.
        seconds: of one call, the median of interleaved rounds; ``lower`` and ``upper``: the quartiles.
        times: how many times as fast as the model as it is.
        kept: bytes that a forward pass keeps for the backward pass; None in evaluation.
        apart: largest difference of an output from the model's, over the output's largest magnitude.
        reason: why there is no figure; empty if there is one.
    """

    task: str
    way: str
    seconds: float | None = None
    lower: float | None = None
    upper: float | None = None
    times: float | None = None
    kept: int | None = None
    apart: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class BenchmarkReport:
    """Every way to run a model, timed beside each other; ``str()`` of it is a table with the advice.

    ``share``: the part of a training step that torch's batch norm takes (forward and backward, without what
    follows it), 0 to 1; None where no step was made. ``norms``: how many batch norms the model has.
    """

    rows: tuple[Row, ...]
    norms: int
    share: float | None
    threads: int

    def row(self, task: str, way: str) -> Row | None:
        """Return the row of a way, if it has figures."""
        found = (r for r in self.rows if (r.task, r.way) == (task, way) and r.seconds is not None)
        return next(found, None)

    @property
    def advice(self) -> str:
        """One sentence: what to do with this model, or that there is nothing to gain."""
        uses = [
            (TRAINING, "fused", "gammabeta.convert(model) for training"),
            (TUNING, "tune", 'convert(model, to="tune") for fine-tuning with frozen statistics'),
            (EVALUATION, "folded", "gammabeta.fold(model, example) for serving"),
        ]
        parts = [f"{call} ({gains})" for task, way, call in uses if (gains := self._gains(task, way))]
        if parts:
            return f"Use {'; '.join(parts)}."
        share = "" if self.share is None else f": batch norm takes {self.share:.0%} of a training step"
        return f"There is nothing to gain for this model on this input{share}. Leave it as it is."

    def _gains(self, task: str, way: str) -> str:
        """What a way gains in time, beyond the spread, and in memory; empty for nothing."""
        row, base = self.row(task, way), self.row(task, "as it is")
        if row is None or base is None or row.times is None:
            return ""
        gains = []
        if _clearly_less(row, base) and row.times >= _GAIN:
            gains.append(f"{row.times:.2f} times as fast")
        less = (base.kept or 0) - (row.kept or 0)
        if base.kept and less > max(_WORTH, base.kept * _LESS):
            slower = f", but only {row.times:.2f} times as fast" if _clearly_less(base, row) else ""
            gains.append(f"{less / base.kept:.0%} less kept for the backward pass{slower}")
        return ", ".join(gains)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "advice": self.advice}

    def cells(self) -> list[tuple[str, ...]]:
        """The table's rows as text: task, way, time, times as fast, spread, memory, difference."""
        return [_cells(row) for row in self.rows]

    def __str__(self) -> str:
        rows = [HEAD, *self.cells()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, self.advice])


def _clearly_less(a: Row, b: Row) -> bool:
    """Whether one's time is below the other's by more than the spread."""
    return (a.upper or 0) < (b.lower or 0)


HEAD = ("task", "way", "time", "times as fast", "spread", "kept", "differs by")


def _cells(row: Row) -> tuple[str, ...]:
    if row.seconds is None:
        return (row.task, row.way, "–", "", "", "", row.reason)
    spread = ((row.upper or 0) - (row.lower or 0)) / 2 / row.seconds
    return (
        row.task,
        row.way,
        readable(row.seconds),
        f"{row.times:.2f}",
        f"± {spread:.0%}",
        "" if row.kept is None else f"{row.kept / 1e6:.1f} MB",
        "" if row.apart is None or row.way == "as it is" else f"{row.apart:.0e}",
    )


def readable(seconds: float) -> str:
    """Seconds in the unit that suits them, with three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            return f"{seconds / size:.3g} {unit}"
    raise AssertionError
