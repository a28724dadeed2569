"""The checks' own explanations as a chapter in Markdown, so that the documentation cannot say something else.

``python -m gammabeta.doctor.handbook docs/doctor.md`` writes it between the page's two marks.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from .checks import CHECKS

BEGIN, END = "<!-- checks: begin -->", "<!-- checks: end -->"
_PARTS = re.compile(r"^(Symptom|Computation|Threshold|Fix|Source): ", re.MULTILINE)


def chapter() -> str:
    """Every check: what it is, then symptom, computation, threshold, fix and source."""
    return "\n\n".join(_section(identifier, check.doc) for identifier, check in CHECKS.items())


def _section(identifier: str, doc: str) -> str:
    head, _, body = doc.partition("\n\n")
    summary = " ".join(head.split()).removeprefix(f"``{identifier}``: ").replace("``", "`")
    pieces = _PARTS.split(body.strip())[1:]
    items = [
        f"- **{label}**: {' '.join(text.split()).replace('``', '`')}"
        for label, text in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    return "\n".join([f"### `{identifier}`", "", summary[0].upper() + summary[1:], "", *items])


def put_between(page: str, begin: str, end: str, text: str) -> str:
    """``page`` with ``text`` in place of what stood between the two marks."""
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{text}\n{end}{after}"


def main(path: str) -> None:
    """Rewrite the chapter in the page at ``path``."""
    page = Path(path)
    page.write_text(put_between(page.read_text("utf-8"), BEGIN, END, chapter()), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
