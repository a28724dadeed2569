"""The report in a terminal: the verdict first, then findings by severity, then a table of layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..finding import Severity

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..report import Group, Report

STYLES: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "note": "cyan"}
NAMED, ROWS = 4, 40


def render(report: Report) -> Iterator[RenderableType]:
    """The parts of the report, for a rich console."""
    yield Text(report.verdict, style="bold green" if report.healthy else "bold")
    for group in report.groups:
        yield Text()
        yield from _group(group)
    gap = report.evidence.gap
    if gap is not None and gap.bn_train is not None:
        yield Text()
        yield Text(
            f"Loss: {_number(gap.train)} in training, {_number(gap.bn_train)} with only batch normalization"
            f" in training, {_number(gap.population)} in evaluation on exact statistics,"
            f" {_number(gap.evaluation)} in evaluation as is."
        )
    if report.evidence.layers:
        yield Text()
        yield from _layers(report)
    for line in report.evidence.not_examined:
        yield Text(f"Not examined: {line}", style="dim")


def _group(group: Group) -> Iterator[RenderableType]:
    first = group.first
    names = ", ".join(group.layers[:NAMED])
    more = f" and {len(group.layers) - NAMED} more" if len(group.layers) > NAMED else ""
    yield Text.assemble(
        (first.severity, STYLES[first.severity]), " ", (first.check, "bold"), "  ", names, more
    )
    prefix = f"{group.layers[0]}: " if len(group.layers) > 1 else ""
    for label, text in (("found", prefix + first.evidence), ("cause", first.cause), ("fix", first.fix)):
        yield Padding(Text.assemble((f"{label:6}", "dim"), text), (0, 0, 0, 2))


def _layers(report: Report) -> Iterator[RenderableType]:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for header in ("layer", "kind"):
        table.add_column(header, overflow="fold")
    for header in ("channels", "momentum", "updates", "mean off by (σ)", "variance ×"):
        table.add_column(header, justify="right")
    rows = [report.layer_row(layer) for layer in report.evidence.layers]
    for row in rows[:ROWS]:
        table.add_row(
            Text(row["name"] or "(model)", style=STYLES.get(row["worst"], "")),
            row["kind"] + (" frozen" if row["frozen"] else ""),
            str(row["channels"]),
            _number(row["momentum"]),
            "-" if row["updates"] is None else str(row["updates"]),
            _number(row["drift_mean"]),
            "-" if row["drift_log_variance"] is None else f"{factor(row['drift_log_variance']):.3g}",
        )
    yield table
    if len(rows) > ROWS:
        yield Text(f"and {len(rows) - ROWS} more layers", style="dim")


def factor(log_variance: float) -> float:
    """A typical logarithm of a ratio of variances, as the ratio."""
    return float(2.718281828459045 ** min(log_variance, 50.0))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
