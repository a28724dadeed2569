"""The report in a terminal: the verdict first, then findings by severity, then a table of layers."""

import math
from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.styled import Styled
from rich.table import Table
from rich.text import Text

from ..text import visible
from .finding import Severity
from .summary import Group, Summary

STYLES: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "note": "cyan"}
NAMED, ROWS = 4, 40


def render(report: Summary) -> Iterator[RenderableType]:
    """The parts of the report, for a rich console."""
    yield Text(report.verdict, style="bold green" if report.healthy else "bold")
    if report.in_short:
        yield Text(report.in_short)
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
        yield Text(f"Not examined: {visible(line)}", style="dim")


def _group(group: Group) -> Iterator[RenderableType]:
    first = group.first
    style = STYLES[first.severity]
    yield Text.assemble((first.severity, style), " ", (first.check, "bold"), "  ", group.names(NAMED))
    for label, text in group.texts.items():
        yield Padding(Text.assemble((f"{label:6}", "dim"), text), (0, 0, 0, 2))


def _layers(report: Summary) -> Iterator[RenderableType]:
    table = Table(box=None, pad_edge=False, header_style="dim")
    rows = [report.layer_row(layer) for layer in report.evidence.layers]
    for header in cells(rows[0]):
        if header in ("layer", "kind"):
            table.add_column(header, overflow="fold")
        elif header != "eps":
            table.add_column(header, justify="right")
    for row in rows[:ROWS]:
        name, kind, channels, _eps, *others = cells(row).values()
        table.add_row(Styled(name, STYLES.get(row["worst"], "")), kind, channels, *others)
    yield table
    if len(rows) > ROWS:
        yield Text(f"and {len(rows) - ROWS} more layers", style="dim")


def cells(row: dict[str, Any], missing: str = "-") -> dict[str, str]:
    """A row of the table of layers, by column; ``missing`` stands where there is no value."""
    variance = row["drift_log_variance"]
    return {
        "layer": visible(row["name"]) or "(model)",
        "kind": visible(row["kind"]) + (" frozen" if row["frozen"] else ""),
        "channels": str(row["channels"]),
        "eps": f"{row['eps']:g}",
        "momentum": _number(row["momentum"], missing),
        "updates": missing if row["updates"] is None else str(row["updates"]),
        "mean off by (σ)": _number(row["drift_mean"], missing),
        "variance ×": _number(None if variance is None else math.exp(min(variance, 50.0)), missing),
    }


def _number(value: float | None, missing: str = "-") -> str:
    return missing if value is None else f"{value:.3g}"
