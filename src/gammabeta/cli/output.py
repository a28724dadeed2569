"""What every command prints with: people's text on a console, one JSON object for programs."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from ..errors import GammabetaWarning
from ..jsontext import to_json

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object; everything else goes to standard error.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only the result.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<index>.")]


def console(json_wanted: bool = False) -> Console:
    """Return the console for people's text: standard error if standard output belongs to JSON."""
    return Console(stderr=json_wanted, highlight=False, soft_wrap=True)


def print_json(document: dict[str, Any]) -> None:
    """Print the one JSON object of a command."""
    sys.stdout.write(to_json(document, default=str) + "\n")
    sys.stdout.flush()


def fail(message: str, code: int) -> int:
    """Print an error as one line on standard error; return the exit code."""
    line = " ".join(message.split())
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"gammabeta: error: {line}", markup=False)
    return code


@contextmanager
def notes() -> Iterator[None]:
    """Print our own warnings as lines on standard error, each once."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, GammabetaWarning):
            line = f"gammabeta: note: {' '.join(str(message).split())}"
            Console(stderr=True, highlight=False, soft_wrap=True).print(line, markup=False)
        else:
            shown_before(message, category, *place, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("default", GammabetaWarning)
        shown_before, warnings.showwarning = warnings.showwarning, show
        yield
