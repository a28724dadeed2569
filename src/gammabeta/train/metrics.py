"""``metrics.jsonl``, line by line: what can be read is used, and what cannot is never worth a training."""

from pathlib import Path
from typing import Any

from ..errors import RunError
from ..files import read_bytes, write_atomically
from ..jsontext import from_json, to_json
from .documents import ROWS, CheckpointInfo, Row, warn

_LARGEST = 1 << 30  # bytes; a day of training writes 50 MB


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of metrics; those that cannot be read are left out, with a warning.

    A last line cut short by a crash is left out without one.
    """
    try:
        content = read_bytes(path, _LARGEST)
    except RunError as error:
        warn(f"{error}: its figures are left out")
        return []
    lines = content.split(b"\n")
    rows = [row for line in lines[:-1] if (row := _row(line)) is not None]
    if len(rows) < len(lines) - 1:
        warn(f"{path} is damaged: {len(lines) - 1 - len(rows)} of {len(lines) - 1} lines are left out")
    last = _row(lines[-1])
    return rows if last is None else [*rows, last]


def _row(line: bytes) -> dict[str, Any] | None:
    """The values of a line, or None if it is damaged."""
    try:
        values = from_json(line.decode("utf-8"))
        kind = values.get("kind") if isinstance(values, dict) else None
        model = ROWS.get(kind, Row) if isinstance(kind, str) else Row
        return model.model_validate(values).model_dump()
    except ValueError:
        return None


def cut_metrics(path: Path, info: CheckpointInfo | None, images_per_epoch: int) -> str | None:
    """Cut a file of metrics back to where a checkpoint was, or to nothing, so that no step comes twice.

    Where it is damaged or missing, the lines that can be read up to that step are kept, and the figures of
    the checkpoint itself are the least. Returns a message if so.
    """
    if info is None:
        write_atomically(path, b"")
        return None
    try:
        content = read_bytes(path, _LARGEST)
    except RunError:
        content = b""
    kept = content[: info.metrics_bytes]
    lines = kept.split(b"\n")
    if len(kept) == info.metrics_bytes and not lines[-1] and all(map(_row, lines[:-1])):
        write_atomically(path, kept)
        return None
    rows = [row for line in content.split(b"\n") if (row := _row(line)) and _step(row) <= info.step]
    if not any(row["kind"] == "progress" and _step(row) == info.step for row in rows):
        figures = info.model_dump(include={"step", "images", "loss", "accuracy", "seconds"})
        epochs = round(info.images / images_per_epoch, 4)
        rows.append({"kind": "progress", "epochs": epochs, "learning_rate": None, **figures})
    write_atomically(path, b"".join(to_json(row).encode() + b"\n" for row in rows))
    return f"{path} is damaged: {len(rows)} lines are kept"


def _step(row: dict[str, Any]) -> int:
    step = row.get("step")
    return step if isinstance(step, int) else 0
