"""The lab's server: one page, its files and its socket, on this machine only."""

import asyncio
import contextlib
import socket
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from ..doctor.report import Report
from ..errors import UsageError
from . import reading
from .benches.faults import FAULTS
from .benches.mates import SIZES
from .session import Session
from .settings import LONGEST
from .workshop import Workshop

HOST = "127.0.0.1"
_HERE = Path(__file__).parent
_HEADERS = {
    "content-security-policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
# The doctor's report is a page of its own with styles inside, without any script.
_REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox; frame-ancestors 'none'"
)


class OnlyHere:
    """Lets in what asks for this machine by its own name and port, and sockets of our own page only.

    Another page in the same browser can send requests to this port. Its sockets have another Origin; a name
    of its own that it lets point here (DNS rebinding) is another Host.
    """

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app = app
        self._hosts = {f"{name}:{port}" for name in (HOST, "localhost")}
        self._origins = {f"http://{host}" for host in self._hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve, or refuse."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {key: value.decode("latin-1") for key, value in scope["headers"]}
        if headers.get(b"host") not in self._hosts:
            await self._refuse(scope, receive, send)
            return
        if scope["type"] == "websocket":
            if headers.get(b"origin") not in self._origins:
                await self._refuse(scope, receive, send)
                return
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *(
                        (name.encode(), value.encode())
                        for name, value in _HEADERS.items()
                        if name.encode() not in present
                    ),
                ]
            await send(message)

        await self._app(scope, receive, send_with_headers)

    @staticmethod
    async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await PlainTextResponse("this address is not the lab's", 403)(scope, receive, send)


def application(workshop: Workshop, port: int) -> ASGIApp:
    """The lab as an ASGI application."""
    reports: dict[str, Report] = {}
    templates = Environment(
        autoescape=True, loader=PackageLoader(__package__), undefined=StrictUndefined, trim_blocks=True
    )

    def page(name: str, **values: Any) -> HTMLResponse:
        return HTMLResponse(templates.get_template(name).render(values))

    def lab(_: Request) -> Response:
        return page("lab.html", faults=FAULTS, sizes=SIZES, lines=reading.lines())

    def document(request: Request) -> Response:
        html = reading.document(request.path_params["name"])
        if html is None:
            return page("reading.html", title="Not here", html="<p>This page is not installed.</p>", lines=[])
        return page("reading.html", title="gammabeta", html=html, lines=[])

    def source(_: Request) -> Response:
        return page("reading.html", title="reference.py", html="", lines=reading.source())

    async def report(request: Request) -> Response:
        found = reports.get(request.path_params["token"])
        if found is None:
            return PlainTextResponse("This report is gone: diagnose again.", 404)
        html = await workshop.do(found.to_html)
        return HTMLResponse(html, headers={"content-security-policy": _REPORT_POLICY})

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await Session(websocket, workshop, reports).run()

    routes = [
        Route("/", lab),
        Route("/docs/{name}", document),
        Route("/source", source),
        Route("/report/{token}", report),
        Mount("/static", StaticFiles(directory=_HERE / "static")),
        WebSocketRoute("/socket", talk),
    ]
    return OnlyHere(Starlette(routes=routes), port)


def bind(port: int | None) -> socket.socket:
    """A socket on the loopback interface; a free port if none is named.

    Raises:
        UsageError: The port is taken, or may not be used.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port or 0))
    except OSError as error:
        listener.close()
        why = error.strerror or "it cannot be used"
        raise UsageError(f"port {port}: {why}; name another with --port, or none for a free one") from None
    return listener


def serve(
    run: Path | None,
    port: int | None,
    *,
    browse: bool,
    tell: Callable[[str], None],
    workshop: Workshop | None = None,
) -> None:
    """Serve the lab until Ctrl-C.

    Args:
        run: A run folder whose network is shown; None: one is trained.
        port: To listen on; None: a free one.
        browse: Open the page in the browser.
        tell: Prints a line.
        workshop: Whose state is served; None: a new one.

    Raises:
        UsageError: The port is taken.
        RunError: ``run`` is not a run folder, or holds another network than the lab shows.
    """
    listener = bind(port)
    with listener:
        workshop = workshop or Workshop(run)
        workshop.open_run()
        number = listener.getsockname()[1]
        address = f"http://{HOST}:{number}/"
        server = _Server(_config(application(workshop, number)), workshop, address, browse, tell)
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(server.serve(sockets=[listener]))
        workshop.close()
    tell("The lab is closed.")


def _config(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        ws="websockets-sansio",
        ws_max_size=LONGEST,
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )


class _Server(uvicorn.Server):
    """Says where it listens, opens the browser, and makes the network ready."""

    def __init__(
        self,
        config: uvicorn.Config,
        workshop: Workshop,
        address: str,
        browse: bool,
        tell: Callable[[str], None],
    ) -> None:
        super().__init__(config)
        self._workshop, self._address, self._browse, self._tell = workshop, address, browse, tell
        self._preparing: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        await super().startup(sockets)
        self._tell(f"The lab is at {self._address} (Ctrl-C closes it)")
        self._preparing = asyncio.create_task(self._prepare())
        if self._browse:
            with contextlib.suppress(webbrowser.Error):
                await asyncio.to_thread(webbrowser.open, self._address)

    async def _prepare(self) -> None:
        await self._workshop.prepare()
        self._tell(self._workshop.state["text"])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop what is computed, then close."""
        self._workshop.close()
        await super().shutdown(sockets)
