"""What every command prints with: people's text on a console, one JSON object for programs."""

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

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
    sys.stdout.write(json.dumps(document, allow_nan=False, default=str) + "\n")
    sys.stdout.flush()


def fail(message: str, code: int) -> int:
    """Print an error as one line on standard error; return the exit code."""
    line = " ".join(message.split())
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"gammabeta: error: {line}", markup=False)
    return code
