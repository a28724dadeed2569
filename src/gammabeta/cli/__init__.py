"""The command line: each command parses, calls, prints."""

import gc
import sys

from .app import app, run

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line and leave with its exit code."""
    # Importing PyTorch makes a million objects that stay. At a threshold of 700 new ones, to visit them again
    # and again takes a fifth of the processor time in which a command begins.
    gc.set_threshold(50_000)
    try:
        sys.exit(run())
    finally:
        gc.freeze()  # nothing of it need be looked through once more when the process ends
