"""Pictures of the lab: every bench, light and dark, wide (1280 pixels) and narrow (360).

``python -m scripts.lab_pictures OUT`` writes 24 PNG files into the folder OUT. ``--docs`` also writes the few
that the documents show into docs/pictures, with fewer colours. It needs what the lab's browser tests need.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.harness.browser import browser, lab, missing, until_ready

ROOT = Path(__file__).parent.parent
LONG = 300_000  # milliseconds: a busy machine takes its time
SIZES = {"wide": (1280, 900), "narrow": (360, 780)}
SHOWN = {"draw-light-wide": "lab-draw", "race-dark-wide": "lab-race", "channel-light-wide": "lab-channel"}


def draw(page: Any) -> None:
    """Bench 1, as it opens."""
    page.wait_for_selector("#draw-answer[data-label]", timeout=LONG)


def race(page: Any) -> None:
    """Bench 2, after some steps at a rate that the twin does not stand."""
    page.click("#race-go")
    page.wait_for_function("document.querySelector('#race-loss').dataset.steps > 60", timeout=LONG)
    page.click("#race-go")


def channel(page: Any) -> None:
    """Bench 3, as it opens."""
    page.wait_for_selector("#channel-steps[data-count]", timeout=LONG)


def mates(page: Any) -> None:
    """Bench 4, after some draws."""
    for _ in range(3):
        page.click("#mates-once")
    page.click("#mates-sizes")
    page.wait_for_function(
        "document.querySelector('#mates-curve').ariaLabel.includes('batch of 256')", timeout=LONG
    )


def break_it(page: Any) -> None:
    """Bench 5: statistics never updated, diagnosed and mended."""
    page.check("[id='break.never_updated']")
    page.click("#break-train")
    page.wait_for_selector("#break-told[data-finished=yes]", timeout=LONG)
    page.click("#break-diagnose")
    page.wait_for_selector("#break-verdict[data-checks]", timeout=LONG)
    page.click("#break-mend")
    page.wait_for_selector("#break-mended[data-after]", timeout=LONG)


def fold(page: Any) -> None:
    """Bench 6, with times."""
    page.wait_for_selector("#fold-told[data-largest]", timeout=LONG)
    page.click("#fold-times")
    page.wait_for_function("document.querySelector('#fold-timed').textContent.includes('ms')", timeout=LONG)


BENCHES: dict[str, Callable[[Any], None]] = {
    "draw": draw,
    "race": race,
    "channel": channel,
    "mates": mates,
    "break": break_it,
    "fold": fold,
}


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--docs", action="store_true", help="also write docs/pictures")
    parser.add_argument("--only", nargs="*", choices=BENCHES, default=list(BENCHES))
    arguments = parser.parse_args()
    if what := missing():
        parser.error(what)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with lab() as (address, _), browser() as opened:
        # The page allows no code from outside; what waits here for its state is such code.
        context = opened.new_context(viewport={"width": 1280, "height": 900}, bypass_csp=True)
        page = context.new_page()
        for bench in arguments.only:
            page.goto(f"{address}?bench={bench}&race.batch=5")
            until_ready(page)
            BENCHES[bench](page)
            for size, (width, height) in SIZES.items():
                page.set_viewport_size({"width": width, "height": height})
                for theme in ("light", "dark"):
                    page.evaluate("theme => document.documentElement.dataset.theme = theme", theme)
                    page.evaluate("dispatchEvent(new Event('redraw'))")
                    page.wait_for_timeout(300)
                    page.screenshot(path=arguments.out / f"{bench}-{theme}-{size}.png", full_page=True)
            page.set_viewport_size({"width": 1280, "height": 900})
    if arguments.docs:
        folder = ROOT / "docs" / "pictures"
        folder.mkdir(exist_ok=True)
        for name, to in SHOWN.items():
            if (arguments.out / f"{name}.png").is_file():
                shrink(arguments.out / f"{name}.png", folder / f"{to}.png")


def shrink(source: Path, target: Path) -> None:
    """The upper part of a picture, 1,000 pixels wide, in 64 colours."""
    with Image.open(source) as picture:
        small = picture.convert("RGB").crop((0, 0, picture.width, min(picture.height, 1000)))
        small.thumbnail((1000, 4000), Image.Resampling.LANCZOS)
        small.quantize(64, dither=Image.Dither.NONE).save(target, optimize=True)


if __name__ == "__main__":
    main()
