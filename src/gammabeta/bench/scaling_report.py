"""What the suite ``scaling`` says of its rows: time per image, where it bends, memory, starts."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from .results import Row, machine_line, markdown_table

#: Time per image counts as flat within this share of the usual case's.
TOLERANCE = 0.10


def report(stamped: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Return the results as a Markdown page."""
    lines = [
        "# How the cost of training grows",
        "",
        f"Medians; measured {stamped['date']} on {machine_line(stamped['machine'])}; gammabeta",
        f"{stamped['versions']['gammabeta']} on torch {stamped['versions'].get('torch')}"
        f" (commit {str(stamped['commit'])[:12]}).",
    ]
    titles = {
        "sizes": "Images in the data set, batch 64",
        "batches": "Images in a batch, 60,000 in the data set",
    }
    for part, title in titles.items():
        chosen = [row for row in rows if row["part"] == part]
        if chosen:
            lines += ["", f"## {title}", "", growth_table(chosen), "", verdict(chosen)]
    starts = [row for row in rows if row["part"] == "starts"]
    if starts:
        lines += ["", "## `gammabeta train` as a whole process", "", starts_table(starts)]
    return "\n".join(lines) + "\n"


def time_per_image(rows: Sequence[Row]) -> dict[str, float]:
    """Return each case's median training time per image, in microseconds, in the order of the rows."""
    names = dict.fromkeys(row["case"] for row in rows)
    return {
        name: median(1e6 * row["train_seconds"] / row["images"] for row in rows if row["case"] == name)
        for name in names
    }


def usual(rows: Sequence[Row]) -> str:
    """Return the case that the others are compared with: 60,000 images and batch 64, or else the first."""
    both = [row["case"] for row in rows if (row["size"], row["batch"]) == (60_000, 64)]
    return str((both or [rows[0]["case"]])[0])


def growth_table(rows: Sequence[Row]) -> str:
    """Return the table of time per image against the usual case."""
    times = time_per_image(rows)
    base = times[usual(rows)]
    body = []
    for name, value in times.items():
        case = [row for row in rows if row["case"] == name]
        memory = median(row["peak_rss_mb"] for row in case)
        body.append(
            [
                name,
                case[0]["precision"],
                f"{value:.1f}",
                f"{value / base:.2f}",
                f"{memory:.0f}",
                str(len(case)),
            ]
        )
    return markdown_table(("", "precision", "µs per image", "× usual", "peak, MB", "runs"), body)


def verdict(rows: Sequence[Row]) -> str:
    """Say in a sentence whether time per image is flat, and where it is not."""
    times, name = time_per_image(rows), usual(rows)
    bends = [
        f"{case} ({value / times[name]:.2f} ×)" for case, value in times.items() if _bends(value, times[name])
    ]
    if not bends:
        return f"Flat within {TOLERANCE:.0%} of {name}."
    return f"Outside {TOLERANCE:.0%} of {name}: {', '.join(bends)}."


def _bends(value: float, base: float) -> bool:
    return abs(value / base - 1) > TOLERANCE


def starts_table(rows: Sequence[Row]) -> str:
    """Return the table of whole processes."""
    body = []
    for name in dict.fromkeys(row["case"] for row in rows):
        case = [row for row in rows if row["case"] == name]
        keys = ("process_seconds", "train_seconds", "evaluate_seconds")
        seconds = [f"{median(row[key] for row in case):.2f}" for key in keys]
        accuracy, memory = (median(row[key] for row in case) for key in ("test_accuracy", "peak_rss_mb"))
        body.append([name, *seconds, f"{accuracy:.4f}", f"{memory:.0f}", str(len(case))])
    header = (
        "",
        "from prompt to end, s",
        "training, s",
        "evaluation, s",
        "test accuracy",
        "peak, MB",
        "runs",
    )
    return markdown_table(header, body)
