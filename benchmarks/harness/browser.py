"""A browser without a screen, and a lab for it to open: for tests, pictures and measurements of the lab."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
NEEDED = ("starlette", "uvicorn", "websockets", "playwright")


def missing() -> str | None:
    """What is missing to open the lab in a browser, in words; None if nothing is."""
    packages = [name for name in NEEDED if find_spec(name) is None]
    if packages:
        return f"not installed: {', '.join(packages)}"
    return None if executable() else "there is no Chromium on the path"


def executable() -> str | None:
    """The browser's path."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=executable(), args=["--no-sandbox"])
        try:
            yield opened
        finally:
            opened.close()


@contextmanager
def lab(*arguments: str, said: list[str] | None = None) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """``gammabeta lab --no-open`` as a process; yields its address and itself, and ends it by Ctrl-C.

    What it prints is added to ``said``.
    """
    said = [] if said is None else said
    command = [sys.executable, "-m", "gammabeta", "lab", "--no-open", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
                yield found[0], process
                break
        else:
            raise RuntimeError(f"the lab did not start: {''.join(said)}")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            said.append(process.communicate(timeout=120)[0])
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def until_ready(page: Any, timeout: float = 240) -> None:
    """Wait until the page's network is trained."""
    page.wait_for_selector("html[data-ready]", state="attached", timeout=1000 * timeout)
