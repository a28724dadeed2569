"""Write what a suite found: JSON for programs, Markdown for readers, bars for the eye."""

import json
from pathlib import Path
from typing import Any

from gammabeta.errors import UsageError

from . import Result, machine


def write(name: str, result: Result, folder: Path) -> list[Path]:
    """Write ``<name>[-<part>]-<machine>.json``, ``.md`` and, where the suite draws, ``.svg``."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = "-".join(filter(None, (name, result.part, machine.slug(result.machine))))
    about = machine.describe()
    if result.machine:
        about["machine"] = f"{result.machine}, {about['machine']}"
    everything = {
        "suite": name,
        **about,
        "summary": result.summary,
        "notes": result.notes,
        "rows": result.rows,
        **({"measured": result.measured} if result.measured else {}),
    }
    written = [folder / f"{stem}.json", folder / f"{stem}.md"]
    written[0].write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    written[1].write_text(markdown(result, about), encoding="utf-8")
    if result.draw:
        written.append(folder / f"{stem}.svg")
        result.draw(written[-1])
    elif result.chart:
        written.append(_draw(result, about, folder / f"{stem}.svg"))
    return written


def stem_of(name: str, quick: bool) -> str:
    """Return what a suite's results are called; a trial never takes the place of a result."""
    return f"{name}-quick" if quick else name


def measured(name: str, folder: Path) -> list[dict[str, Any]]:
    """Return every single run of an earlier result of this machine, to be added to; none if there is none."""
    path = folder / f"{name}-{machine.slug()}.json"
    if not path.exists():
        return []
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")).get("measured", [])
    return found


def markdown(result: Result, about: dict[str, Any]) -> str:
    """The result as a page."""
    packages = ", ".join(f"{p} {v}" for p, v in about["packages"].items() if v)
    lines = [
        f"# {result.title}",
        "",
        f"{about['machine']}, {about['threads']} threads; Python {about['python']}, {packages}; "
        f"commit {about['commit']}, {about['date']}.",
        "",
    ]
    lines += [f"- {key}: {_cell(value)}" for key, value in result.summary.items()]
    lines += ["", *result.notes, "", ""] if result.notes else ["", ""]
    return "\n".join(lines) + table(result.rows)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; the columns are those of the first row."""
    if not rows:
        return ""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two marks in a page.

    Raises:
        UsageError: the page lacks one of them.
    """
    before, _, rest = page.read_text("utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise UsageError(f"{page} has no text between {begin} and {end} to replace")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def _draw(result: Result, about: dict[str, Any], path: Path) -> Path:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    rows = [row for row in result.rows if isinstance(row.get(str(result.chart)), int | float)]
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.22 * len(rows)), layout="constrained")
    axes.barh([row["case"] for row in rows], [row[str(result.chart)] for row in rows], color="#3b6ea5")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel(str(result.chart))
    axes.set_title(f"{result.title} · {about['machine']}", fontsize=9)
    axes.tick_params(labelsize=7)
    mpl.rcParams["svg.hashsalt"] = "gammabeta"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
