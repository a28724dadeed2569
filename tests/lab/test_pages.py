"""The lab in a real browser: each bench opened, driven and read back."""

import json
import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.browser import lab, until_ready
from gammabeta.lab.benches.faults import FAULTS, Fault

from .conftest import LONG, Watched

BENCHES = ("draw", "race", "channel", "mates", "break", "fold")
THREE = [(0.3, 0.25), (0.5, 0.15), (0.65, 0.3), (0.5, 0.45), (0.68, 0.6), (0.6, 0.82), (0.3, 0.8)]


def opened(watched: Watched, address: str, query: str) -> Any:
    watched.page.goto(f"{address}?{query}")
    until_ready(watched.page)
    return watched.page


def until(condition: Callable[[], bool]) -> None:
    """Wait in the test: the page's policy forbids code that is sent to it to wait there."""
    end = time.monotonic() + LONG / 1000
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def number(page: Any, selector: str, name: str) -> float:
    return float(page.get_attribute(selector, f"data-{name}") or "nan")


def move(page: Any, control: str, value: float | str) -> None:
    """Set a control as a person does, with its events."""
    page.eval_on_selector(
        f"[id='{control}']",
        "(c, v) => { c.value = v; c.dispatchEvent(new Event('input', {bubbles: true})); }",
        str(value),
    )


class Late:
    """The connection of a page that is not open yet; it holds back what the server says about one thing."""

    def __init__(self, page: Any) -> None:
        self._held: list[tuple[Any, str]] = []
        self._about: str | None = None
        self._page = page
        page.route_web_socket("**/socket", self._connect)

    def hold(self, about: str) -> None:
        self._about = about

    def wait(self) -> None:
        """Until something is held."""
        while not self._held:
            self._page.wait_for_timeout(20)

    def release(self) -> None:
        self.wait()
        self._about = None
        for socket, text in self._held:
            socket.send(text)
        self._held.clear()

    def _connect(self, socket: Any) -> None:
        server = socket.connect_to_server()
        server.on_message(lambda text: self._pass(socket, text))

    def _pass(self, socket: Any, text: str) -> None:
        if json.loads(text)["about"] == self._about:
            self._held.append((socket, text))
        else:
            socket.send(text)


def test_a_drawn_three_is_a_three(watched: Watched, address: str):
    page = opened(watched, address, "bench=draw")
    page.wait_for_selector("#draw-answer[data-label]")
    page.click("#draw-clear")
    box = page.locator("#paper").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in THREE]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=4)
    page.mouse.up()
    page.wait_for_selector("#draw-answer[data-label='3']")
    assert "This is a 3" in page.inner_text("#draw-answer")
    assert page.locator("#draw-layers canvas").count() == 9
    # Without a mouse: a test image, by keyboard.
    page.focus("[id='draw.digit']")
    page.keyboard.type("0")
    page.wait_for_selector("#draw-answer[data-label='0']")


def test_a_late_answer_does_not_show_what_was_wiped_away(watched: Watched, address: str):
    connection = Late(watched.page)
    page = opened(watched, address, "bench=draw")
    page.wait_for_selector("#draw-answer[data-label]")
    connection.hold("draw")
    page.click("#paper")  # a dot: it is sent, and its answer is late
    page.click("#paper", position={"x": 20, "y": 20})  # this one waits behind it
    move(page, "draw.digit", 0)
    page.wait_for_selector("#draw-answer[data-label='0']")
    shown = number(page, "#draw-answer", "count")
    connection.release()
    connection.hold("draw.sample")
    page.click("#draw-sample")
    page.click("#draw-clear")
    connection.release()
    move(page, "draw.digit", 1)  # when this is answered, whatever was late has come
    page.wait_for_selector("#draw-answer[data-label='1']")
    assert number(page, "#draw-answer", "count") == shown + 1


def test_late_answers_are_not_counted_with_another_image(watched: Watched, address: str):
    connection = Late(watched.page)
    page = opened(watched, address, "bench=mates")
    page.wait_for_selector("#mates-told[data-training]")
    connection.hold("mates")
    page.click("#mates-once")
    move(page, "mates.image", 40)
    connection.release()
    until(lambda: "8 draws" in page.inner_text("#mates-told"))
    label = page.inner_text("#mates-label")
    connection.hold("mates.part")
    page.click("#mates-sizes")
    connection.wait()
    move(page, "mates.image", 5)
    connection.release()
    until(lambda: page.inner_text("#mates-label") != label)
    assert "batch of" not in (page.get_attribute("#mates-curve", "aria-label") or "")


# The first settings of the page, a learning rate of 0.5, with batches of 32; and of 128, until 98 %.
@pytest.mark.parametrize(
    ("batch", "wanted"),
    [(5, 0.85), pytest.param(7, 0.98, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
def test_the_twin_without_batch_norm_loses(watched: Watched, address: str, batch: int, wanted: float):
    page = opened(watched, address, f"bench=race&race.batch={batch}")
    page.wait_for_selector("#race-ribbon-conv1")
    page.click("#race-go")
    page.wait_for_selector("#race-without-told.lost")
    until(lambda: number(page, "#race-with", "best") >= wanted)
    page.click("#race-go")
    page.wait_for_selector("#race-go[aria-pressed=false]")
    assert "Diverged" in page.inner_text("#race-without-told")
    assert number(page, "#race-without", "best") < 0.3
    assert "%" in page.inner_text("#race-with")
    # Settings stand in the address, and a reload keeps them.
    move(page, "race.depth", 3)
    page.wait_for_selector("#race-ribbon-fc3")
    assert "race.depth=3" in page.url
    page.reload()
    page.wait_for_selector("#race-ribbon-fc3")
    assert page.input_value("[id='race.depth']") == "3"


def test_a_channel_and_its_sliders(watched: Watched, address: str):
    page = opened(watched, address, "bench=channel")
    page.wait_for_selector("#channel-steps[data-count]")
    seen = number(page, "#channel-steps", "count")
    move(page, "channel.beta", 1.5)
    until(lambda: number(page, "#channel-steps", "count") > seen)
    until(lambda: "γ x̂ + (1.5)" in page.inner_text("#channel-steps"))
    assert "∂L/∂γ" in page.inner_text("#channel-told")


def test_batch_mates_move_a_prediction_in_training_only(watched: Watched, address: str):
    page = opened(watched, address, "bench=mates&mates.size=3")
    page.wait_for_selector("#mates-told[data-training]")
    page.click("#mates-once")
    until(lambda: "16 draws" in page.inner_text("#mates-told"))
    assert number(page, "#mates-told", "training") > 0
    assert number(page, "#mates-told", "evaluation") == 0


def test_break_diagnose_mend(watched: Watched, address: str):
    page = opened(watched, address, "bench=break&break.never_updated=1")
    page.click("#break-train")
    page.wait_for_selector("#break-told[data-finished=yes]")
    page.click("#break-diagnose")
    page.wait_for_selector("#break-verdict[data-checks]")
    assert "never-updated" in page.get_attribute("#break-verdict", "data-checks").split()
    assert "recalibrate" in page.inner_text("#break-findings")
    page.click("#break-mend")
    page.wait_for_selector("#break-mended[data-after]")
    assert number(page, "#break-mended", "after") > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.key)
def test_each_fault_is_named_on_the_page(watched: Watched, address: str, fault: Fault):
    page = opened(watched, address, f"bench=break&break.{fault.key}=1")
    page.click("#break-train")
    page.wait_for_selector("#break-told[data-finished=yes]")
    page.click("#break-diagnose")
    page.wait_for_selector("#break-verdict[data-checks]")
    assert set(page.get_attribute("#break-verdict", "data-checks").split()) & set(fault.checks)


def test_the_fold(watched: Watched, address: str):
    page = opened(watched, address, "bench=fold")
    page.wait_for_selector("#fold-told[data-largest]")
    assert number(page, "#fold-told", "largest") < 1e-5
    assert page.locator("#fold-rows tr").count() == 10
    page.click("#fold-times")
    until(lambda: " ms" in page.inner_text("#fold-timed"))


def axe() -> str:
    """axe-core's script, out of the package that carries it."""
    found = find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        what = "axe-core is not installed: the package axe-playwright-python carries it"
        if os.environ.get("GAMMABETA_NEEDS_BROWSER"):
            pytest.fail(what)
        pytest.skip(what)
    return (Path(found.origin).parent / "axe.min.js").read_text(encoding="utf-8")


def test_no_serious_accessibility_fault(address: str, chromium: Any):
    script = axe()
    context = chromium.new_context(viewport={"width": 360, "height": 780}, bypass_csp=True)
    page = context.new_page()
    page.set_default_timeout(LONG)
    page.goto(address)
    until_ready(page)
    page.evaluate(script)
    found = []
    for bench in BENCHES:
        page.click(f"[data-bench={bench}]")
        page.wait_for_selector(f"[data-section={bench}]:not([hidden])")
        for theme in ("light", "dark"):
            page.evaluate("theme => { document.documentElement.dataset.theme = theme; }", theme)
            result = page.evaluate("axe.run({resultTypes: ['violations']})")
            found += [
                (bench, theme, v["id"], v["nodes"][0]["html"][:120])
                for v in result["violations"]
                if v["impact"] in ("serious", "critical")
            ]
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
            f"{bench} is wider than 360"
        )
    context.close()
    assert found == []


def test_control_c_ends_it_cleanly_while_it_trains(chromium: Any):
    said: list[str] = []
    context = chromium.new_context()
    page = context.new_page()
    page.set_default_timeout(LONG)
    with lab(said=said) as (address, process):
        page.goto(address)
        until(lambda: "Connecting" not in page.inner_text("#state-text"))
    context.close()
    assert process.returncode == 0
    lines = "".join(said).strip().splitlines()
    assert lines[0].startswith("The lab is at")
    assert lines[-1] == "The lab is closed."
    assert len(lines) <= 4, lines
