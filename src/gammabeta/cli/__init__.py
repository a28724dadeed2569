"""The command line: each command parses, calls, prints."""

import sys

from .app import app, run

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(run())
