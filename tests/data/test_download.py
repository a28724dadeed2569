"""Downloads from a server on this machine: kept, checked, continued, and taken elsewhere when need be."""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gammabeta.data import load
from gammabeta.data.catalog import KNOWN
from gammabeta.data.download import RemoteFile, cache_folder, fetch
from gammabeta.errors import DataError

CONTENT = bytes(range(256)) * 4000  # about a megabyte: several pieces
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Server:
    """What the handler serves, and what it was asked."""

    address: str = ""
    content: dict[str, bytes] = field(default_factory=dict)
    cut_after: dict[str, int] = field(default_factory=dict)  # bytes to send before hanging up, each time
    ranges: bool = True
    asked: list[tuple[str, str | None]] = field(default_factory=list)

    def url(self, path: str) -> str:
        return f"{self.address}/{path}"


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path, wanted = self.path.lstrip("/"), self.headers.get("Range")
            state.asked.append((path, wanted))
            if path not in state.content:
                self.send_error(404)
                return
            content, start = state.content[path], 0
            if wanted and state.ranges:
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
                if start >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:][: state.cut_after.get(path)])

        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state.address = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        http.shutdown()
        thread.join()


def remote(server: Server, *paths: str, **changes) -> RemoteFile:
    given = {"name": "data.bin", "size": len(CONTENT), "sha256": SHA256, **changes}
    return RemoteFile(urls=tuple(server.url(path) for path in paths), **given)


def test_file_is_fetched_once(server, tmp_path):
    server.content["a/data.bin"] = CONTENT
    steps: list[tuple[str, int, int]] = []
    for _ in range(2):
        folder = fetch(
            [remote(server, "a/data.bin")], "x", folder=tmp_path, progress=lambda *s: steps.append(s)
        )
    assert (folder / "data.bin").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["data.bin"]
    assert server.asked == [("a/data.bin", None)]
    assert steps[-1] == ("data.bin", len(CONTENT), len(CONTENT))
    assert [done for _, done, _ in steps] == sorted({done for _, done, _ in steps})


def test_broken_connection_is_taken_up_where_it_broke(server, tmp_path):
    server.content["data.bin"] = CONTENT
    server.cut_after["data.bin"] = 300_000
    fetch([remote(server, "data.bin")], "x", folder=tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == [
        None,
        "bytes=300000-",
        "bytes=600000-",
        "bytes=900000-",
    ]


def test_download_of_an_earlier_process_is_continued(server, tmp_path):
    server.content["data.bin"] = CONTENT
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:1000])
    fetch([remote(server, "data.bin")], "x", folder=tmp_path)
    assert server.asked == [("data.bin", "bytes=1000-")]
    assert (tmp_path / "data.bin").read_bytes() == CONTENT


def test_server_without_ranges_sends_all_again(server, tmp_path):
    server.content["data.bin"] = CONTENT
    server.ranges = False
    (tmp_path / "data.bin.part").write_bytes(b"\xff" * 1000)
    fetch([remote(server, "data.bin")], "x", folder=tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("beginning", [b"\xff" * 1000, b"\xff" * len(CONTENT), b"\xff" * 2 * len(CONTENT)])
def test_wrong_beginning_is_thrown_away(server, tmp_path, beginning):
    server.content["data.bin"] = CONTENT
    (tmp_path / "data.bin.part").write_bytes(beginning)
    fetch([remote(server, "data.bin")], "x", folder=tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["data.bin"]


def test_next_mirror_goes_on_where_the_first_stopped(server, tmp_path):
    server.content.update({"one/data.bin": CONTENT, "two/data.bin": CONTENT})
    server.cut_after["one/data.bin"] = 100_000  # five times 100,000 and no more
    fetch([remote(server, "missing/data.bin", "one/data.bin", "two/data.bin")], "x", folder=tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT
    assert server.asked[0] == ("missing/data.bin", None)
    assert server.asked[-1] == ("two/data.bin", "bytes=500000-")


def test_mirror_with_other_content_is_passed_over(server, tmp_path):
    other = bytes(reversed(CONTENT))
    server.content.update({"one/data.bin": other, "two/data.bin": CONTENT})
    fetch([remote(server, "one/data.bin", "two/data.bin")], "x", folder=tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT


def test_damaged_file_in_the_cache_is_fetched_again(server, tmp_path):
    server.content["data.bin"] = CONTENT
    (tmp_path / "data.bin").write_bytes(CONTENT[:-1])
    fetch([remote(server, "data.bin")], "x", folder=tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (bytes(len(CONTENT)), "its SHA-256 is not the one expected"),
        (CONTENT + b"x", "it sends more than the 1024000 bytes expected"),
        (CONTENT[:-1], "the connection broke off|416"),
        (None, "HTTP 404"),
    ],
)
def test_wrong_everywhere_is_one_line_that_says_what_to_do(server, tmp_path, content, why):
    if content is not None:
        server.content["data.bin"] = content
    with pytest.raises(DataError, match=why) as caught:
        fetch([remote(server, "data.bin")], "pets", folder=tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("pets: data.bin cannot be downloaded (")
    assert f"download data.bin from {server.address}/ and put them into {tmp_path}" in message
    assert not (tmp_path / "data.bin").exists()


def test_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("GAMMABETA_CACHE", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")

    def unreachable(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("socket.getaddrinfo", unreachable)
    with pytest.raises(DataError) as caught:
        load("fashion-mnist")
    message = str(caught.value)
    assert "\n" not in message
    assert "Network is unreachable" in message
    for file in KNOWN["fashion-mnist"].files:
        assert file.name in message
    assert "from http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/" in message
    assert f"put them into {tmp_path / 'fashion-mnist'}" in message


def test_unwritable_cache_is_an_error_not_a_traceback(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    server.content["data.bin"] = CONTENT
    with pytest.raises(DataError, match="cannot be downloaded"):
        fetch([remote(server, "data.bin")], "x", folder=tmp_path / "file" / "below")


def test_second_process_does_not_touch_the_first_ones_part(server, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    server.content["data.bin"] = CONTENT
    part = tmp_path / "data.bin.part"
    part.write_bytes(b"mine")
    with part.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        fetch([remote(server, "data.bin")], "x", folder=tmp_path)
    assert part.read_bytes() == b"mine"
    assert (tmp_path / "data.bin").read_bytes() == CONTENT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.bin.part"]


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("GAMMABETA_CACHE", str(tmp_path))
    assert cache_folder("kmnist") == tmp_path / "kmnist"
    monkeypatch.delenv("GAMMABETA_CACHE")
    assert cache_folder("kmnist").parts[-2:] == ("gammabeta", "kmnist")
