"""``Report``: what ``diagnose`` returns, a summary that can show itself.

The summary is plain data and knows no rendering; the renderings read it; this class puts the two together.
"""

import io
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult

from . import html, terminal
from .summary import Summary


class Report(Summary):
    """What :func:`gammabeta.diagnose` found.

    ``print(report)`` gives the terminal's text; a notebook shows the HTML.

    Attributes:
        findings: the most severe first.
        evidence: what the checks looked at.
    """

    def to_html(self) -> str:
        """One self-contained page, pictures included."""
        return html.page(self)

    def save_html(self, path: str | Path) -> Path:
        """Write :meth:`to_html` to ``path``."""
        path = Path(path)
        path.write_text(self.to_html(), encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        return html.body(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from terminal.render(self)

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=100, color_system=None).print(self)
        return text.getvalue().rstrip("\n")

    def __repr__(self) -> str:
        return f"<Report: {self.verdict}>"
