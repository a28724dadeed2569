"""The lab in a browser: when its page is usable, how soon a stroke is answered, frames, memory, cost.

Needs what the lab's tests in a browser need: the extra ``lab``, Playwright, Chromium.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.harness import Options, Result
from benchmarks.harness.browser import browser, lab, missing, until_ready
from gammabeta.data import load
from gammabeta.errors import UnavailableError
from gammabeta.lab.benches.race import Race, Track
from gammabeta.train.batches import DeviceImages, Scaling

LONG = 600_000  # milliseconds
# A stroke of 50 moves; from each the time until its answer stands on the page.
STROKE = """async count => {
  const paper = document.getElementById("paper"), answer = document.getElementById("draw-answer");
  const box = paper.getBoundingClientRect(), times = [];
  const event = (kind, t) => paper.dispatchEvent(new PointerEvent(kind, {
    pointerId: 1, button: 0, buttons: 1, bubbles: true,
    clientX: box.left + box.width * (0.3 + 0.4 * t), clientY: box.top + box.height * (0.2 + 0.6 * t) }));
  paper.setPointerCapture = () => {};
  event("pointerdown", 0);
  await new Promise(done => setTimeout(done, 500));
  for (let i = 1; i <= count; i++) {
    const seen = answer.dataset.count, start = performance.now();
    const shown = new Promise(done => {
      const observer = new MutationObserver(() => {
        if (answer.dataset.count !== seen) { observer.disconnect(); done(); }
      });
      observer.observe(answer, { attributes: true });
    });
    event("pointermove", i / count);
    await shown;
    times.push(performance.now() - start);
    await new Promise(done => setTimeout(done, 20));
  }
  event("pointerup", 1);
  return times;
}"""


def add_options(parser: Any) -> None:
    """How long memory is watched."""
    parser.add_argument("--minutes", type=float, default=10, help="of trainings, then memory; %(default)s")


def run(options: Options) -> Result:
    """Measure everything in one lab; the start three times."""
    if what := missing():
        raise UnavailableError(f"the lab needs a browser to be measured: {what}")
    starts = 1 if options.quick else 3
    seconds = 3 if options.quick else 20
    minutes = 0.1 if options.quick else options.given.minutes
    rows: list[dict[str, Any]] = []

    def row(what: str, value: float, unit: str) -> None:
        rows.append({"what": what, "value": round(value, 3), "unit": unit})

    with browser() as opened:
        context = opened.new_context(viewport={"width": 1280, "height": 900}, bypass_csp=True)
        page = context.new_page()
        page.set_default_timeout(LONG)
        usable, trained = [], []
        for number in range(starts):
            began = time.perf_counter()
            with lab() as (address, process):
                page.goto(f"{address}?bench=draw")
                until_ready(page, LONG / 1000)
                page.wait_for_selector("#draw-answer[data-label]")
                usable.append(time.perf_counter() - began)
                trained.append(float(page.get_attribute("html", "data-trained") or "nan"))
                if number == starts - 1:
                    row("from the command to a page that answers (median)", median(usable), "s")
                    strokes(page, row, "alone")
                    other = context.new_page()
                    other.set_default_timeout(LONG)
                    race(other, address, row, seconds)
                    strokes(page, row, "while a race runs in another tab")
                    remember(other, process.pid, row, minutes)
                    other.close()
                    page.goto("about:blank")
    row("first training, in the lab with its page open (median)", median(trained), "s")
    row("the same by gammabeta train (median)", median(by_command() for _ in range(starts)), "s")
    return Result(
        "The lab", rows, notes=[f"Chromium without a screen, memory after {minutes:g} minutes of races."]
    )


def strokes(page: Any, row: Any, when: str) -> None:
    """From a move of the pen to its answer on the page."""
    times = page.evaluate(STROKE, 50)
    row(f"stroke to prediction, {when}: median of 50", median(times), "ms")
    row(f"stroke to prediction, {when}: worst of 50", max(times), "ms")


def race(page: Any, address: str, row: Any, seconds: float) -> None:
    """Frames and steps a second of a race at the page's first settings, and its steps without a page."""
    page.goto(f"{address}?bench=race")
    page.wait_for_selector("#race-ribbon-conv1")
    page.click("#race-go")
    page.wait_for_function("document.documentElement.dataset.frames > 5")
    state = """() => [performance.now(), Number(document.documentElement.dataset.frames),
      Number(document.getElementById("race-loss").dataset.steps)]"""
    before = page.evaluate(state)
    page.wait_for_timeout(1000 * seconds)
    after = page.evaluate(state)
    elapsed, frames, steps = ((b - a) for a, b in zip(before, after, strict=True))
    row("frames of the race", 1000 * frames / elapsed, "per s")
    row("steps of the race, both networks, with its page", 1000 * steps / elapsed, "per s")
    page.click("#race-go")
    page.wait_for_selector("#race-go[aria-pressed=false]")
    row("the same without a page", without_page(seconds / 2), "per s")
    page.click("#race-reset")
    page.wait_for_timeout(1000)
    page.click("#race-go")


def without_page(seconds: float) -> float:
    """Steps a second of the same race in a process of its own kind: this one."""
    digits = load("mnist")
    scaling = Scaling.of(digits.train.images, "standardized")
    parts = [DeviceImages(part, scaling, torch.device("cpu")) for part in (digits.train, digits.test)]
    contest = Race(Track(rate=0.5, batch=128), *parts)
    for _ in range(5):
        contest.step()
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        contest.step()
    return (contest.steps - 5) / (time.perf_counter() - began)


def remember(page: Any, process: int, row: Any, minutes: float) -> None:
    """Memory of the lab and of its page, now and after some minutes of races."""
    row("memory of the lab before", memory(process), "MiB")
    end = time.perf_counter() + 60 * minutes
    while time.perf_counter() < end:
        page.wait_for_timeout(min(5000, max(100, 1000 * (end - time.perf_counter()))))
        if page.get_attribute("#race-go", "aria-pressed") == "false":  # a race has an end
            page.click("#race-reset")
            page.wait_for_timeout(1000)
            page.click("#race-go")
    row(f"memory of the lab after {minutes:g} minutes", memory(process), "MiB")
    heap = page.evaluate("() => performance.memory.usedJSHeapSize") / 2**20
    row(f"heap of the page after {minutes:g} minutes", heap, "MiB")


def memory(process: int) -> float:
    """Resident memory of a process in MiB."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


def by_command() -> float:
    """Seconds of training that ``gammabeta train`` says of itself."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gammabeta", "train", "--json", "--out", str(Path(folder) / "run")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["seconds"]["train"])
