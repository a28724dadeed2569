"""Links that lead out of ``docs``: pages beside the benchmarks become pages, files downloads, folders words.

In a checkout these links open the files themselves; the site is read without one.
"""

import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

COPIED = ("benchmarks/results/*.md", "benchmarks/*/README.md")
COPIES = "results"  # the folder in docs, which version control ignores
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[\w.-]*/?[^)#\s:]*)(?P<anchor>#[^)\s]*)?\)")


def name_of(page: Path) -> str:
    """The name of a copy: its own, or for a README its folder's."""
    return f"{page.parent.name}.md" if page.name == "README.md" else page.name


def copy_pages(app: Any) -> None:
    """Put the pages that stand beside the benchmarks where the site is built from."""
    root, target = Path(app.srcdir).parent, Path(app.srcdir) / COPIES
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for pattern in COPIED:
        for page in sorted(root.glob(pattern)):
            (target / name_of(page)).write_text("---\norphan: true\n---\n" + page.read_text("utf-8"), "utf-8")


def rewrite(app: Any, name: str, source: list[str]) -> None:
    """Rewrite the links of one page; ``source`` is a list of one text, as Sphinx hands it over."""
    docs = Path(app.srcdir)
    root, here = docs.parent, (docs / name).parent
    up = "../" * (len(PurePosixPath(name).parts) - 1)
    copied = {page.resolve(): name_of(page) for pattern in COPIED for page in root.glob(pattern)}

    def outside(match: re.Match[str]) -> str:
        path = (here / match["target"]).resolve()
        if path in copied:
            return f"[{match['text']}]({up}{COPIES}/{copied[path]})"
        if path.is_relative_to(docs) and (path.exists() or not name.startswith(COPIES)):
            return match[0]  # a page of ours, or a mistake that Sphinx is to tell
        return match[0] if path.is_file() and path.suffix != ".md" else match["text"]

    source[0] = _LINK.sub(outside, source[0])


def setup(app: Any) -> dict[str, bool]:
    """Connect both to Sphinx."""
    app.connect("builder-inited", copy_pages)
    app.connect("source-read", rewrite)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
