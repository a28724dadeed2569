"""One trained network for the benches, one lab and one browser for the pages."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from benchmarks.harness import browser as driver
from gammabeta.data import Dataset, Split, load
from gammabeta.lab.subject import Subject, train_subject
from gammabeta.train.batches import DeviceImages, Scaling

LONG = 240_000  # milliseconds; conditions are waited for, and a busy machine is slow


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """A part of MNIST: enough to learn from, quick to train on."""
    whole = load("mnist")
    return Dataset(
        whole.name,
        Split(whole.train.images[:8192].copy(), whole.train.labels[:8192].copy()),
        Split(whole.test.images[:1000].copy(), whole.test.labels[:1000].copy()),
        whole.classes,
        whole.preparation,
    )


@pytest.fixture(scope="session")
def subject(digits: Dataset) -> Subject:
    return train_subject(digits)


@pytest.fixture(scope="session")
def images(digits: Dataset) -> tuple[DeviceImages, DeviceImages]:
    scaling = Scaling.of(digits.train.images, "standardized")
    return tuple(DeviceImages(part, scaling, torch.device("cpu")) for part in (digits.train, digits.test))  # type: ignore[return-value]


@dataclass
class Watched:
    """A page, what its console said, and the addresses it asked for."""

    page: Any
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def needs_browser() -> None:
    """Skip where there is no browser; fail where one was promised, as in CI."""
    if what := driver.missing():
        if os.environ.get("GAMMABETA_NEEDS_BROWSER"):
            pytest.fail(f"the lab's pages were to be tested in a browser: {what}")
        pytest.skip(f"the lab's pages need a browser: {what}")


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    needs_browser()
    with driver.lab() as (found, _):
        yield found


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    needs_browser()
    with driver.browser() as opened:
        yield opened


@pytest.fixture
def watched(address: str, chromium: Any) -> Iterator[Watched]:
    """A new page of the lab; no test may leave a word on the console, or ask another host."""
    context = chromium.new_context(viewport={"width": 1000, "height": 900})
    page = context.new_page()
    page.set_default_timeout(LONG)
    found = Watched(page)
    page.on("console", lambda message: found.console.append(message.text))
    page.on("pageerror", lambda error: found.console.append(str(error)))
    page.on("request", lambda request: found.requests.append(request.url))
    page.on("websocket", lambda socket: found.requests.append(socket.url))
    yield found
    context.close()
    assert found.console == []
    allowed = (address, address.replace("http", "ws"))
    assert found.requests
    assert [url for url in found.requests if not url.startswith(allowed)] == []
