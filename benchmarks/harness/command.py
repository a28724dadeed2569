"""One run of our own command line in a process of its own: its result, its wall-clock time and its memory."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from types import MappingProxyType
from typing import Any

from gammabeta.errors import UnavailableError

_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Run:
    """What ``gammabeta train --json`` printed, and the process as seen from outside.

    ``seconds`` runs from the start of the process to its end, Python's own start included; ``peak_rss_mb`` is
    the most memory it held, to within what it may have gained in its last twentieth of a second.
    """

    result: dict[str, Any]
    seconds: float
    peak_rss_mb: float


def train(
    arguments: Sequence[str], timeout: float, variables: Mapping[str, str] = MappingProxyType({})
) -> Run:
    """Run ``gammabeta train ARGUMENTS --json``, with some environment variables set anew.

    Raises:
        UnavailableError: It failed or took longer than ``timeout`` seconds.
    """
    command = [sys.executable, "-m", "gammabeta", "train", *arguments, "--json", "--quiet"]
    environment = {**os.environ, **variables}
    with TemporaryFile("w+") as output, TemporaryFile("w+") as errors:
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=errors)
        try:
            peak = _watch(process, began + timeout)
        finally:
            process.kill()  # of no consequence once it has ended
            process.wait()
        seconds = time.perf_counter() - began
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            why = (errors.read().strip().splitlines() or ["no message"])[-1]
            raise UnavailableError(f"gammabeta train ended with code {process.returncode}: {why[:200]}")
        return Run(json.loads(output.read()), seconds, peak)


def _watch(process: subprocess.Popen[bytes], deadline: float) -> float:
    """Wait for the end of a process; return the most memory it held, in MB."""
    peak, status = 0.0, Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        peak = max(peak, _high_water_mark(status))
        if time.perf_counter() > deadline:
            raise UnavailableError("gammabeta train took too long")
        time.sleep(_POLL_SECONDS)
    return peak


def _high_water_mark(status: Path) -> float:
    try:
        lines = status.read_text().splitlines()
    except OSError:  # it has just ended, or this is no Linux
        return 0.0
    found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return found[0] * 1024 / 1e6 if found else 0.0
