"""What the suite ``training`` says of its rows: medians, a table, a bar chart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from ..harness import Result, machine

Row = dict[str, Any]

_OURS, _PEERS = (
    "#0072B2",
    "#B8B8B8",
)  # apart in lightness too, so that they are apart in grey and to every eye


@dataclass(frozen=True)
class Summary:
    """One contestant's medians over its rows that count; ``failures`` say why the others do not."""

    name: str
    title: str
    recipe: str
    precision: str
    runs: int
    medians: Mapping[str, float]
    fastest: float
    slowest: float
    failures: tuple[str, ...]

    @property
    def ours(self) -> bool:
        """Tell whether this is gammabeta."""
        return self.title == "gammabeta"

    @property
    def label(self) -> str:
        """The title with what tells its rows apart."""
        recipe = f", recipe {self.recipe}" if self.ours else ""
        return f"{self.title}{recipe}{', bf16' if self.precision == 'bf16' else ''}"


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """Return each contestant's summary, the quickest first and those without a counted run last."""
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    summaries = [_summary(name, [row for row in rows if row["contestant"] == name]) for name in names]
    return sorted(summaries, key=lambda s: s.medians.get("epoch_seconds", float("inf")))


def _summary(name: str, rows: Sequence[Row]) -> Summary:
    counted = [row for row in rows if row["counts"]]
    figures = [key for key, value in (counted[0] if counted else {}).items() if isinstance(value, float)]
    medians = {key: median(row[key] for row in counted) for key in figures}
    times = [row["epoch_seconds"] for row in counted]
    told = (counted or rows)[-1]
    failures = [_failure(row) for row in rows if not row["counts"]]
    return Summary(
        name=name,
        title=told["title"],
        recipe=told["recipe"],
        precision=told["precision"],
        runs=len(counted),
        medians=medians,
        fastest=min(times, default=float("nan")),
        slowest=max(times, default=float("nan")),
        failures=tuple(failures),
    )


def _failure(row: Row) -> str:
    if "error" in row:
        return str(row["error"])
    return f"accuracy {row['test_accuracy']}, loss {row['moving_loss']:.4f}"


def quickest_peer(summaries: Sequence[Summary], precision: str | None = "fp32") -> Summary | None:
    """Return the quickest of the others; in float32 the one that the ratios are taken against.

    Args:
        summaries: Everyone's.
        precision: That the peer computes in; None: any.
    """
    others = [s for s in summaries if s.runs and not s.ours and precision in (None, s.precision)]
    return min(others, key=lambda s: s.medians["epoch_seconds"], default=None)


def table_row(summary: Summary, floor: float | None) -> dict[str, str]:
    """Return a contestant's row of the table; ``floor`` is the epoch of the quickest peer."""
    values = summary.medians
    epoch = values["epoch_seconds"]
    warm_up = f"{values['warmup_seconds']:.1f}" if "warmup_seconds" in values else "in the epoch"
    return {
        "case": f"**{summary.label}**" if summary.ours else summary.label,
        "epoch, s": f"{epoch:.2f}",
        "range": f"{summary.fastest:.2f}–{summary.slowest:.2f}",
        "of the quickest peer": f"{epoch / floor:.2f}" if floor else "",
        "warm-up, s": warm_up,
        "evaluation, s": f"{values['evaluate_seconds']:.2f}",
        "process, s": f"{values['process_seconds']:.1f}",
        "loss": f"{values['moving_loss']:.4f}",
        "test accuracy": f"{values['test_accuracy']:.4f}",
        "peak, MB": f"{values['peak_rss_mb']:.0f}",
        "runs": str(summary.runs),
    }


def versions(rows: Sequence[Row]) -> str:
    """Return the versions of all peers in one line."""
    found: dict[str, str] = {}
    for row in rows:
        named = row.get("versions", {})
        found.update({name: number for name, number in named.items() if name not in ("numpy", "python")})
    return ", ".join(f"{name} {number}" for name, number in sorted(found.items()))


def result_of(rows: Sequence[Row]) -> Result:
    """Return the result of all runs: the table, how we compare, and the runs that do not count."""
    summaries = summarise(rows)
    counted = [summary for summary in summaries if summary.runs]
    peer = quickest_peer(summaries)
    floor = peer.medians["epoch_seconds"] if peer else None
    counts = {row["images"] for row in rows if row["recipe"] == "classic" and "images" in row}
    trained = " or ".join(f"{number:,}" for number in sorted(counts))
    notes = [
        f"One epoch on {trained} images in memory; medians of interleaved rounds, a process each. "
        "Warm-up (compilation, first calls) is outside everyone's epoch, but inside that of recipe fast, "
        "as is its recalibration; recipe classic is not recalibrated here, as the peers are not. "
        "Evaluation is of the training and the test images; process is from start to end.",
        "",
        f"Peers: {versions(rows) or 'none'}.",
    ]
    failed = [f"- does not count: {s.label}: {reason}" for s in summaries for reason in s.failures]
    return Result(
        "The notebook's network trained by gammabeta and its peers",
        [table_row(summary, floor) for summary in counted],
        comparison(counted, peer),
        notes + (["", *failed] if failed else []),
        draw=partial(chart, counted) if counted else None,
        measured=list(rows),
    )


def comparison(summaries: Sequence[Summary], peer: Summary | None) -> dict[str, str]:
    """Say how each of ours compares with the quickest peer in float32, and with any that is quicker still."""
    if peer is None:
        return {}
    theirs = peer.medians["epoch_seconds"]
    said = {"quickest peer": f"{peer.label}, {theirs:.2f} s"}
    any_peer = quickest_peer(summaries, None) or peer
    least = any_peer.medians["epoch_seconds"]
    if any_peer is not peer:
        said["quickest peer in any precision"] = f"{any_peer.label}, {least:.2f} s"
    for ours in (summary for summary in summaries if summary.ours):
        epoch = ours.medians["epoch_seconds"]
        said[ours.label] = f"{epoch:.2f} s, {theirs / epoch:.2f} times as fast"
        if any_peer is not peer and ours.precision != peer.precision:
            said[ours.label] += f" ({least / epoch:.2f} times the quickest in any precision)"
    return said


def chart(shown: Sequence[Summary], path: Path) -> None:
    """Draw the medians as bars with their range; one far longer than the rest is cut, and says so."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    values = [s.medians["epoch_seconds"] for s in shown]
    limit = _limit(values)
    figure = Figure(figsize=(8, 0.9 + 0.36 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    for place, (summary, value) in enumerate(zip(shown, values, strict=True)):
        cut = value > limit
        axes.barh(
            place, min(value, limit), color=_OURS if summary.ours else _PEERS, hatch="//" if cut else None
        )
        if not cut:
            axes.plot([summary.fastest, summary.slowest], [place, place], color="black", linewidth=1)
        end = limit if cut else max(value, summary.slowest)
        text = f"{value:.1f} s{' (bar cut)' if cut else ''}"
        axes.annotate(text, (end, place), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(shown)), [s.label for s in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, limit * 1.3)
    axes.set_xlabel("seconds of training (median; line: range)")
    axes.set_title(f"Training the notebook's network, {machine.name()}", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    with mpl.rc_context({"svg.hashsalt": "gammabeta"}):
        figure.savefig(path, metadata={"Date": None})


def _limit(values: Sequence[float]) -> float:
    """Return the length at which bars are cut: that of the second longest where the longest dwarfs it."""
    longest = sorted(values)[-2:]
    return longest[0] * 1.1 if len(longest) == 2 and longest[1] > 2.5 * longest[0] else longest[-1]
