"""Write the chapter of checks in the doctor's page from the checks' docstrings, so that both say the same.

    python -m scripts.doctor_page docs/doctor.md

writes it between the page's two marks.
"""

import re
import sys
from pathlib import Path

from gammabeta.doctor.checks import CHECKS, Check

BEGIN, END = "<!-- checks: begin -->", "<!-- checks: end -->"
PARTS = ("Symptom", "Computation", "Threshold", "Fix", "Source")


def chapter() -> str:
    """Every check: what it is, then symptom, computation, threshold, fix and source."""
    return "\n\n".join(section(check) for check in CHECKS.values())


def section(check: Check) -> str:
    """One check in Markdown; its docstring must have all parts, in their order."""
    head, *pieces = re.split(rf"^({'|'.join(PARTS)}): ", check.doc.replace("``", "`"), flags=re.MULTILINE)
    if tuple(pieces[::2]) != PARTS:
        raise SystemExit(f"{check.identifier}: the docstring must have {', '.join(PARTS)}, in this order")
    items = [
        f"- **{label}**: {' '.join(text.split())}"
        for label, text in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    return "\n".join([f"### `{check.identifier}`", "", " ".join(head.split()), "", *items])


def put_between(page: str, begin: str, end: str, text: str) -> str:
    """``page`` with ``text`` in place of what stood between the two marks."""
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{text}\n{end}{after}"


def main(path: Path) -> None:
    """Rewrite the chapter in the page at ``path``."""
    path.write_text(put_between(path.read_text("utf-8"), BEGIN, END, chapter()), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/doctor.md"))
