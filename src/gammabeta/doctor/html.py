"""The report as one self-contained page: no script, no font, no picture from anywhere else."""

import re
from typing import Any

from ..pages import embedded, render
from .plots import plots
from .summary import Summary
from .terminal import cells


def page(report: Summary) -> str:
    """A whole HTML document."""
    return render("doctor.html", **_values(report))


def body(report: Summary) -> str:
    """What stands in the page, and in a notebook's cell."""
    return render("doctor_body.html", **_values(report))


def _values(report: Summary) -> dict[str, Any]:
    layers = report.evidence.layers
    title, counts = report.headline
    return {
        "title": title,
        "counts": counts,
        "in_short": report.in_short,
        "groups": [(group, re.sub(":? `.+?`", "", group.texts["fix"])) for group in report.groups],
        "plots": [
            (title, words, embedded(svg.encode(), "image/svg+xml")) for title, words, svg in plots(report)
        ],
        "layers": [cells(report.layer_row(layer), missing="–") for layer in layers],
        "not_examined": report.evidence.not_examined,
    }
