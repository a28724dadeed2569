"""What every command prints with: people's text on a console, one JSON object for programs."""

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ..errors import GammabetaWarning, UsageError
from ..jsontext import to_json
from ..kernels.cpu.cache import hush
from ..text import for_terminal, one_line

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object; everything else goes to standard error.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only the result.", callback=hush)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<index>.")]

_FILE_WIDTH = 10_000  # columns that a table may take where standard output is no terminal


class Screen(Console):
    """A console on which text from outside stays text: no markup, no emoji codes, no control sequences.

    A string is one line. What has several, and what has a style, is a ``Text`` or a table.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, soft_wrap=True, **options)
        self._chosen_width = options.get("width")

    def render_str(
        self, text: str, *, style: Any = "", justify: Any = None, overflow: Any = None, **_: Any
    ) -> Text:
        """Return a string, also a cell of a table, as it is measured and shown."""
        return Text(for_terminal(text, self.encoding), style=style, justify=justify, overflow=overflow)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render; whatever the text went through, the terminal gets no more than text."""
        if isinstance(renderable, Table):
            for column in renderable.columns:
                column.overflow = "fold"  # a figure is never cut: without its end it is another one
            if not (self.is_terminal or self._chosen_width):  # a file has room for whole names
                options = (options or self.options).update(max_width=_FILE_WIDTH)
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


def to_nowhere(stream: IO[str]) -> None:
    """Let what is left in a stream's buffer go to nowhere, now and when Python ends."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


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


def share(value: float | None) -> str:
    """An accuracy as every command writes it; a dash where there is none."""
    return "–" if value is None else f"{value:.5g}"


def size_of(text: str | None) -> tuple[int, int] | None:
    """(H, W) of an option such as ``32x48``, or of one side, ``32``."""
    if text is None:
        return None
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and (width or height).isdecimal()):
        raise UsageError(f"{text!r} is not HxW, for example 32x32")
    return int(height), int(width or height)
