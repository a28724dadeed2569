"""``gammabeta lab``: a page on this machine where one sees batch normalization work."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UnavailableError, installing
from .output import Quiet, console

_NEEDED = ("starlette", "uvicorn", "websockets")


def lab(
    run: Annotated[
        Path | None,
        typer.Argument(help="A run folder whose network is shown; default: one is trained, in seconds."),
    ] = None,
    browse: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in the browser.")] = True,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="To listen on; default: a free one.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Open a page where one sees batch normalization work, and breaks it. It stays on this machine."""
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise UnavailableError(f"the lab needs {', '.join(missing)}: {installing('lab')}")
    from ..lab.server import serve

    screen = console()
    serve(run, port, browse=browse, tell=lambda line: None if quiet else screen.print(line))
