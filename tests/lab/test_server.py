"""Who may ask the lab, what it answers to nonsense, and that nothing goes on for a page that has gone."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra lab is not installed")
pytest.importorskip("uvicorn", reason="the extra lab is not installed")
client = pytest.importorskip("websockets.sync.client", reason="the extra lab is not installed")

from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402

from gammabeta.errors import UsageError  # noqa: E402
from gammabeta.lab import reading, server, settings  # noqa: E402
from gammabeta.lab.subject import Subject  # noqa: E402
from gammabeta.lab.workshop import Workshop  # noqa: E402

LONG = 120


@dataclass
class Served:
    """A lab in this process, so that a test can look into it."""

    port: int
    workshop: Workshop

    @contextmanager
    def page(self, **options: Any) -> Iterator[Any]:
        origin = options.pop("origin", f"http://127.0.0.1:{self.port}")
        with client.connect(
            f"ws://127.0.0.1:{self.port}/socket", origin=origin, open_timeout=LONG, close_timeout=1, **options
        ) as page:
            yield page

    def get(self, path: str, host: str | None = None) -> "Answer":
        """Ask with any Host, none if it is empty."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONG)
        try:
            connection.putrequest("GET", path, skip_host=True)
            connection.putheader("Host", f"127.0.0.1:{self.port}" if host is None else host)
            connection.putheader("Connection", "close")
            connection.endheaders()
            with connection.getresponse() as answer:
                return Answer(answer.status, dict(answer.getheaders()), answer.read().decode())
        finally:
            connection.close()


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    text: str


@pytest.fixture(scope="module")
def served(subject: Subject, images) -> Iterator[Served]:
    import uvicorn

    workshop = Workshop(None)
    workshop.subject = subject
    workshop.state = {"stage": "ready", "share": 1.0, "text": "Ready"}
    workshop.images, workshop.test = images
    listener = server.bind(None)
    port = listener.getsockname()[1]
    running = uvicorn.Server(server._config(server.application(workshop, port)))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until(lambda: running.started)
    yield Served(port, workshop)
    workshop.close()
    running.should_exit = True
    thread.join(LONG)
    listener.close()
    assert not thread.is_alive()


def told(page: Any, about: str) -> dict[str, Any]:
    """The next message about something."""
    while True:
        message = json.loads(page.recv(timeout=LONG))
        if message["about"] == about:
            return message


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def ask(page: Any, **message: Any) -> None:
    page.send(json.dumps(message))


RACE = {"do": "race.set", "rate": 0.1, "batch": 8, "scale": 1, "depth": 1, "activation": "relu", "seed": 0}


def test_the_page_has_its_policy(served: Served):
    answer = served.get("/")
    assert answer.status == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    text = answer.text
    assert "style=" not in text
    assert "http://" not in text
    assert "https://" not in text


@pytest.mark.parametrize("host", ["evil.example", "localhost", "127.0.0.1", "127.0.0.1:1", ""])
def test_another_host_is_refused(served: Served, host):
    assert served.get("/", host).status in (400, 403)


def test_its_own_names_are_not_refused(served: Served):
    assert served.get("/", f"localhost:{served.port}").status == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:1", "null", None])
def test_a_socket_of_another_page_is_refused(served: Served, origin):
    before = served.workshop.sessions
    with pytest.raises(InvalidStatus), served.page(origin=origin):
        pass
    assert served.workshop.sessions == before


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "[]",
        '{"do": "draw"}',
        '{"do": "open", "path": "/etc/passwd"}',
        '{"do": "draw", "strokes": [[[0, 2]]]}',
        json.dumps(RACE | {"rate": 1e9}),
        '{"do": "channel", "layer": 0, "channel": 0, "draw": 0, "path": "x"}',
        '{"do": "break.train", "faults": ["rm"]}',
    ],
)
def test_nonsense_is_answered_with_an_error(served: Served, text):
    with served.page() as page:
        page.send(text)
        assert told(page, "error")["bench"] == "lab"


def test_a_message_that_is_too_long_ends_the_page(served: Served):
    with served.page() as page:
        page.send("x" * (settings.LONGEST + 1))
        with pytest.raises(ConnectionClosed):
            told(page, "nothing, for it is closed")


def test_a_closed_page_ends_its_training(served: Served):
    workshop = served.workshop
    with served.page() as page:
        ask(page, **RACE)
        told(page, "race.set")
        ask(page, do="race.run", go="start")
        frame = told(page, "race.frame")
        assert frame["running"]
        assert served.workshop.sessions == 1
    until(lambda: workshop.sessions == 0)
    time.sleep(1.5)  # what was being computed ends within two seconds
    steps = workshop.steps
    time.sleep(0.5)
    assert workshop.steps == steps


def test_a_page_that_hangs_makes_its_training_wait(served: Served):
    workshop = served.workshop
    with served.page() as page:
        ask(page, **RACE)
        ask(page, do="race.run", go="start")
        frames = [told(page, "race.frame") for _ in range(3)]
        until(lambda: not workshop._lane._work_queue.qsize())
        time.sleep(0.5)
        assert workshop.steps - frames[-1]["step"] >= 0
        steps = workshop.steps
        time.sleep(0.5)
        assert workshop.steps == steps
        ask(page, do="seen", bench="race")
        assert told(page, "race.frame")["since"] == frames[-1]["step"]


def test_pages_do_not_disturb_each_other(served: Served):
    with served.page() as first, served.page() as second:
        ask(first, **RACE)
        ask(second, **{**RACE, "seed": 1})
        for page in (first, second):
            told(page, "race.set")
        ask(first, do="race.run", go="step")
        assert told(first, "race.run")["step"] == 1
        ask(second, do="race.run", go="step")
        assert told(second, "race.run")["step"] == 1
        ask(second, do="draw.sample", digit=3, number=0)
        assert told(second, "draw.sample")["code"]


def test_a_report_is_served_until_its_page_ends(served: Served):
    with served.page() as page:
        ask(page, do="break.train", faults=["never_updated"])
        frame = told(page, "break.train")
        while frame["step"] < 10:
            ask(page, do="seen", bench="break")
            frame = told(page, "break.frame")
        ask(page, do="break.do", what="diagnose")
        answer = told(page, "break.do")
        assert "never-updated" in {group["check"] for group in answer["groups"]}
        report = served.get(f"/report/{answer['report']}")
        assert report.status == 200
        assert "sandbox" in report.headers["content-security-policy"]
        assert "never-updated" in report.text
    until(lambda: served.workshop.sessions == 0)
    assert served.get(f"/report/{answer['report']}").status == 404


def test_a_taken_port_is_one_line():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UsageError, match="--port"):
            server.bind(other.getsockname()[1])


@pytest.mark.parametrize("name", reading.DOCUMENTS)
def test_documents_are_pages(name):
    html = reading.document(name)
    assert html is not None
    assert "<h1" in html
    assert "<script" not in html


def test_no_other_file_is_a_page(served: Served):
    paths = ("/docs/..%2f..%2fpyproject", "/docs/recipes", "/static/../server.py", "/static/%2e%2e/server.py")
    for path in paths:
        assert "def " not in served.get(path).text


def test_lines_of_the_reference():
    first, last = reading.lines()["normalize"]
    assert reading.source()[first - 1].startswith("def normalize(")
    assert last > first
