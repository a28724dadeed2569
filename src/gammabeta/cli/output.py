"""What every command prints with: people's text on a console, one JSON object for programs."""

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from ..errors import GammabetaWarning
from ..jsontext import to_json
from ..text import for_terminal, one_line

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object; everything else goes to standard error.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only the result.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<index>.")]


class Screen(Console):
    """A console on which text from outside stays text: no markup, no emoji codes, no control sequences.

    A string is one line. What has several, and what has a style, is a ``Text`` or a table.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, soft_wrap=True, **options)

    def render_str(
        self, text: str, *, style: Any = "", justify: Any = None, overflow: Any = None, **_: Any
    ) -> Text:
        """Return a string, also a cell of a table, as it is measured and shown."""
        return Text(for_terminal(text, self.encoding), style=style, justify=justify, overflow=overflow)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render; whatever the text went through, the terminal gets no more than text."""
        for segment in super().render(renderable, options):
            if segment.control or (segment.text.isascii() and segment.text.isprintable()):
                yield segment
            else:
                lines = (for_terminal(line, self.encoding) for line in segment.text.split("\n"))
                yield Segment("\n".join(lines), segment.style)


def prepare_streams() -> None:
    """Write what the encoding of standard output or error lacks as escapes, where nothing else has."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def console(json_wanted: bool = False) -> Screen:
    """Return the console for people's text: standard error if standard output belongs to JSON."""
    return Screen(stderr=json_wanted)


def print_json(document: dict[str, Any]) -> None:
    """Print the one JSON object of a command."""
    sys.stdout.write(to_json(document, default=str) + "\n")
    sys.stdout.flush()


def fail(message: str, code: int) -> int:
    """Print an error as one line on standard error; return the exit code."""
    Screen(stderr=True).print(f"gammabeta: error: {one_line(message)}")
    return code


@contextmanager
def notes() -> Iterator[None]:
    """Print our own warnings as lines on standard error, each once."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, GammabetaWarning):
            Screen(stderr=True).print(f"gammabeta: note: {one_line(message)}")
        else:
            shown_before(message, category, *place, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("default", GammabetaWarning)
        shown_before, warnings.showwarning = warnings.showwarning, show
        yield
