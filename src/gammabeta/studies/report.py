"""A study's result as files: a page in Markdown, pictures, and all numbers as JSON."""

import math
from pathlib import Path
from typing import Any

from ..files import make_folder, read_json, write_atomically
from ..jsontext import to_json
from ..text import visible
from .conduct import results_of, verdict_of
from .pictures import THEMES, render
from .study import Spread, Study

_DIGITS = 5  # significant, of the numbers in a document


def write(study: Study, document: dict[str, Any], folder: Path) -> list[Path]:
    """Write NAME.json, NAME.md and NAME-light and -dark as SVG and PNG; returns their paths."""
    make_folder(folder)
    document = _short(document)  # the page and the pictures say what the file says
    written = [folder / f"{study.name}.json"]
    write_atomically(written[0], (to_json(document, indent=1) + "\n").encode())
    written += draw(study, document, folder, ("svg", "png"))
    page = f"# {study.title}\n\n{section(study, document, '')}"
    written.append(folder / f"{study.name}.md")
    write_atomically(written[-1], page.encode())
    return written


def draw(study: Study, document: dict[str, Any], folder: Path, kinds: tuple[str, ...]) -> list[Path]:
    """Write a study's pictures, light and dark."""
    results, written = results_of(document), []
    for look in THEMES:
        for kind in kinds:
            written.append(folder / f"{study.name}-{look}.{kind}")
            write_atomically(written[-1], render(study, results, look, kind))
    return written


def read(folder: Path, name: str) -> dict[str, Any] | None:
    """Read a study's result from a folder; None if there is none."""
    path = folder / f"{name}.json"
    document: dict[str, Any] | None = read_json(path) if path.exists() else None
    return document


def section(study: Study, document: dict[str, Any], pictures: str) -> str:
    """One study in Markdown, without its heading; ``pictures`` is the way to the folder of its pictures."""
    verdict = verdict_of(document)
    parts = [
        f"**Claim.** {study.claim} {study.paper}, {study.where}.",
        f"**Verdict: {verdict}.**" + _quick(document),
        _picture(study, pictures),
        f"**How.** {study.method} Our tool: {study.tool}.",
        "**Criteria**, written before this run:\n\n"
        + "\n".join(_criterion(each) for each in document["criteria"]),
        _table(study, document),
        f"**What differs from the paper.** {study.differs}"
        + (f" {document['note']}." if document["note"] else ""),
    ]
    if study.changed:
        parts.append(f"**Changed after a first run, and why.** {study.changed}")
    if verdict != "reproduced" and study.believed:
        parts.append(f"**Why not, as we believe.** {study.believed}")
    parts.append(_origin(document))
    return "\n\n".join(parts) + "\n"


def number(value: float | None) -> str:
    """A number as a table has it: four significant digits."""
    return (
        "–"
        if value is None or not math.isfinite(value)
        else f"{value:,.4g}"
        if abs(value) < 1e5
        else f"{value:.3g}"
    )


def _quick(document: dict[str, Any]) -> str:
    return " (`--quick`: it shows that the study runs, and nothing else.)" if document["quick"] else ""


def _picture(study: Study, folder: str) -> str:
    light, dark = (f"{folder}{study.name}-{look}.svg" for look in THEMES)
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{study.title}" src="{light}"></picture>'
    )


def _criterion(each: dict[str, Any]) -> str:
    return (
        f"- {'holds' if each['holds'] else 'fails'} ({each['seeds']} of {each['of']} seeds): {each['says']}"
    )


def _table(study: Study, document: dict[str, Any]) -> str:
    rows = ["| | mean | deviation | 95 % interval | of each seed |", "|---|---|---|---|---|"]
    for name, label in study.numbers.items():
        spread = Spread(**document["numbers"][name])
        each = ", ".join(number(seed["numbers"][name]) for seed in document["seeds"])
        interval = "–" if _lacks(spread.half_width) else f"± {number(spread.half_width)}"
        rows.append(f"| {label} | {number(spread.mean)} | {number(spread.deviation)} | {interval} | {each} |")
    return "\n".join(rows)


def _lacks(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def _origin(document: dict[str, Any]) -> str:
    machine, versions = document["machine"], document["versions"]
    seeds = "1 seed" if len(document["seeds"]) == 1 else f"{len(document['seeds'])} seeds"
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    data = f"{visible(document['data'])}; " if document["data"] else ""
    return (
        f"*{data}{seeds}, {document['seconds'] / len(document['seeds']):.0f} s each, on "
        f"{visible(machine['processor'])}, "
        f"{threads}; gammabeta at {(document['commit'] or 'no commit')[:10]}, PyTorch "
        f"{versions['torch']}, Python {versions['python']}.*"
    )


def _short(value: Any) -> Any:
    """Plain data with numbers of five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return [_short(item) for item in value] if isinstance(value, list | tuple) else value
