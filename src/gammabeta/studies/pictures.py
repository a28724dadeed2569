"""How the studies' pictures look: one style, light and dark, as PNG and SVG."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..text import fit_fonts
from .study import Results, Study

#: Okabe and Ito's palette, the first lighter on a dark page.
_COLORS = {
    "light": ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07b00", "#56b4e9"),
    "dark": ("#56b4e9", "#ff8b3d", "#2fcc9d", "#e39ac2", "#e6b422", "#8fa6ff"),
}
_POINTS = 100  # of a line; more are not seen
_PAGE = {"light": ("#ffffff", "#1f2328", "#d9dde2"), "dark": ("#0d1117", "#e6edf3", "#30363d")}
THEMES = tuple(_PAGE)


@contextmanager
def theme(name: str) -> Iterator[None]:
    """Matplotlib's settings for a light or a dark page."""
    page, ink, grid = _PAGE[name]
    settings: Any = {
        "figure.facecolor": page,
        "axes.facecolor": page,
        "savefig.facecolor": page,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "legend.labelcolor": ink,
        "grid.color": grid,
        "axes.grid": True,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=_COLORS[name]),
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "font.size": 9,
        "font.family": "sans-serif",
        "legend.facecolor": page,
        "legend.edgecolor": page,
        "legend.fontsize": 8,
        "lines.linewidth": 1.6,
        "lines.markersize": 4,
        "svg.fonttype": "none",  # text stays text: small files, and letters that can be searched
        "svg.hashsalt": "gammabeta",  # the same picture is the same file
    }
    with mpl.rc_context(settings):
        yield


def render(study: Study, results: Results, look: str, kind: str) -> bytes:
    """Return a study's picture: ``look`` is light or dark, ``kind`` png or svg."""
    with theme(look):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        study.draw(figure, results)
        fit_fonts(figure)
        buffer = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(buffer, format=kind, dpi=110, metadata=metadata)
    return _smaller(buffer.getvalue()) if kind == "svg" else buffer.getvalue()


def _smaller(svg: bytes) -> bytes:
    """Half of the file: one font for the list in every text, no indentation, and short numbers.

    Lines are drawn to a tenth of a point, everything else to a hundredth.
    """
    svg = re.sub(rb"(?<=font-family: )[^;]+", b"sans-serif", svg)
    svg = re.sub(rb"<[^>]+>", lambda tag: re.sub(rb"(\d\.\d\d)\d+", rb"\1", tag[0]), svg)  # no words
    svg = re.sub(rb' d="[^"]+"', lambda line: re.sub(rb"(\d\.\d)\d+", rb"\1", line[0]), svg)
    return re.sub(rb"\n +", b"\n", svg)


def color(number: int) -> str:
    """The style's colour of a number, the same in all panels of a picture."""
    found: str = mpl.rcParams["axes.prop_cycle"].by_key()["color"][number]
    return found


def line(axes: Axes, x: Sequence[float], results: Results, curve: str, number: int, **style: Any) -> None:
    """Draw a curve's mean over the seeds, and a band from its least to its greatest value."""
    thin = slice(None, None, max(1, len(x) // _POINTS))
    x = x[thin]
    mean, low, high = (values[thin] for values in results.curve(curve))
    axes.plot(x, mean, color=color(number), **style)
    axes.fill_between(x, low, high, color=color(number), alpha=0.18, linewidth=0)


def bars(axes: Axes, names: Sequence[str], results: Results, keys: Sequence[str], number: int = 0) -> None:
    """Draw numbers as points, each on a line from the least to the greatest of the seeds."""
    for place, key in enumerate(keys):
        values = results.values(key)
        axes.plot([place, place], [min(values), max(values)], color=color(number), linewidth=3, alpha=0.35)
        axes.plot([place] * len(values), values, "_", color=color(number), markersize=9)
        axes.plot([place], [sum(values) / len(values)], "o", color=color(number), markersize=6)
    axes.set_xticks(range(len(names)), names)
    axes.margins(x=0.12)
    axes.grid(visible=False, axis="x")
