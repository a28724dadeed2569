"""What the suite ``scaling`` says of its runs: time per image, where it bends, memory, whole processes."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from ..harness import Result

Row = dict[str, Any]

#: Time per image counts as flat within this share of the usual case's.
TOLERANCE = 0.10

_PARTS = {"sizes": "time per image over data set sizes", "batches": "time per image over batch sizes"}


def result_of(rows: Sequence[Row]) -> Result:
    """Return the result of all runs: a row for each case, and a sentence on each part."""
    summary = {}
    for part, title in _PARTS.items():
        chosen = [row for row in rows if row["part"] == part]
        if chosen:
            summary[title] = verdict(chosen)
    summary["most memory held"] = f"{max(row['peak_rss_mb'] for row in rows):.0f} MB"
    notes = [
        "Medians, a process each. The first step, which loads kernels and touches memory first, costs the "
        "same whatever follows and is told apart from the time per image. Sizes are of the data set with "
        "batches of 64, batches are of 60,000 images: one epoch of recipe classic with the mean loss. The "
        "first run has an empty compilation cache, the later run a full one: `gammabeta train` as typed. "
        "Process is from start to end; evaluation is of all images."
    ]
    names = dict.fromkeys(row["case"] for row in rows)
    body = [table_row([row for row in rows if row["case"] == name]) for name in names]
    return Result("How the cost of training grows", body, summary, notes, measured=list(rows))


def table_row(runs: Sequence[Row]) -> dict[str, str]:
    """Return the medians of one case as a row of the table."""

    def middle(key: str) -> float:
        return float(median(row[key] for row in runs))

    return {
        "case": str(runs[0]["case"]),
        "precision": str(runs[0]["precision"]),
        "µs per image": f"{time_per_image(runs):.1f}",
        "training, s": f"{middle('train_seconds'):.2f}",
        "of it the first step": f"{middle('first_step_seconds'):.2f}",
        "evaluation, s": f"{middle('evaluate_seconds'):.2f}",
        "process, s": f"{middle('process_seconds'):.2f}",
        "test accuracy": f"{middle('test_accuracy'):.4f}",
        "peak, MB": f"{middle('peak_rss_mb'):.0f}",
        "runs": str(len(runs)),
    }


def time_per_image(runs: Sequence[Row]) -> float:
    """Return the median training time per image after the first step, in microseconds."""

    def one(row: Row) -> float:
        images = row["images"] * (row["steps"] - 1) / row["steps"]
        return float(1e6 * (row["train_seconds"] - row["first_step_seconds"]) / images)

    return float(median(one(row) for row in runs))


def verdict(rows: Sequence[Row]) -> str:
    """Say whether time per image is flat against 60,000 images and batch 64, and where it is not."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    usual = [name for name, runs in cases.items() if (runs[0]["size"], runs[0]["batch"]) == (60_000, 64)]
    name = (usual or list(cases))[0]
    base = time_per_image(cases[name])
    ratios = {case: time_per_image(runs) / base for case, runs in cases.items()}
    bends = [f"{case} ({ratio:.2f} ×)" for case, ratio in ratios.items() if abs(ratio - 1) > TOLERANCE]
    if not bends:
        return f"flat within {TOLERANCE:.0%} of {name}"
    return f"outside {TOLERANCE:.0%} of {name}: {', '.join(bends)}"
