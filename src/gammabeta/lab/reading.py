"""The pages that the benches link to: our documents and ``reference.py``, from this machine."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from .. import reference

_HERE = Path(__file__).parent
# In an installed package the documents lie beside this file; in a clone they are where they were written.
_FOLDERS = (_HERE / "docs", _HERE.parents[2] / "docs")
DOCUMENTS = ("batch-normalization", "doctor", "fold", "lab", "nn", "statistics", "training")
_LINK = re.compile(r'href="(?!https?:|#)([^"#]*)(#[^"]*)?"')


def document(name: str) -> str | None:
    """A document as HTML; None if it is none of ours, or was not installed."""
    if name not in DOCUMENTS:
        return None
    for folder in _FOLDERS:
        path = folder / f"{name}.md"
        if path.is_file():
            return _as_html(path.read_text(encoding="utf-8"))
    return None


def _as_html(text: str) -> str:
    text = re.sub(r"!\[([^\]]*)\]\([^)]*\)", r"*(Picture: \1)*", text)  # pictures are not installed
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    html = _with_anchors(str(markdown.render(text)))
    return _LINK.sub(_to_page, html)


def _with_anchors(html: str) -> str:
    def anchored(found: re.Match[str]) -> str:
        plain = re.sub(r"<[^>]*>", "", found[2]).lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        return f'<h{found[1]} id="{anchor}">{found[2]}</h{found[1]}>'

    return re.sub(r"<h([1-6])>(.*?)</h\1>", anchored, html)


def _to_page(found: re.Match[str]) -> str:
    name = Path(found[1]).stem
    if name in DOCUMENTS:
        return f'href="/docs/{name}{found[2] or ""}"'
    return 'href="/source"' if name == "reference" else "data-elsewhere"


@cache
def source() -> list[str]:
    """The lines of ``reference.py``."""
    return Path(str(reference.__file__)).read_text(encoding="utf-8").splitlines()


@cache
def lines() -> dict[str, tuple[int, int]]:
    """First and last line of each function and class of ``reference.py``."""
    tree = ast.parse("\n".join(source()))
    kinds: Any = (ast.FunctionDef, ast.ClassDef)
    return {
        node.name: (node.lineno, node.end_lineno or node.lineno)
        for node in tree.body
        if isinstance(node, kinds)
    }
