"""Make the notebook out of the page *Batch normalization explained*, and the page's outputs by running it.

Usage: ``python -m scripts.learn_notebook``. It runs the blocks if one has changed, or always with ``--run``,
and writes the notebook with its outputs. What the blocks print goes under them on the page; what they draw,
into ``docs/pictures/learn-N.png``.
"""

import argparse
import base64
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "batch-normalization.md"
NOTEBOOK = ROOT / "notebooks" / "batch_norm_from_scratch.ipynb"
# A block, and what stands directly under it: what it printed, and what it drew.
_BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?P<text>\n```text\n.*?^```\n)?(\n!\[[^\n]*\n)?", re.M | re.S
)
_LINK = re.compile(r"\]\((?!https?:|#)([^)]+)\)")
_HOW_TO_OPEN = re.compile(r"^The same page as a \[notebook\].*?```\n\n", re.M | re.S)


class ThisInterpreter(AsyncKernelManager):
    """Starts the kernel with ``sys.executable``, whatever kernels are registered on the machine."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """The kernel's command line."""
        return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])


def words(text: str, answering: bool) -> str:
    """A page's words as a cell's: links from the notebook's folder, each ``<details>`` closed in its cell."""
    text = _LINK.sub(lambda match: f"]({os.path.relpath(PAGE.parent / match[1], NOTEBOOK.parent)})", text)
    if answering:
        text = text.replace("</details>", "", 1)
    if text.count("<details>") > text.count("</details>"):
        text += "\n</details>"
    return text.strip()


def cells(page: str) -> Iterator[nbformat.NotebookNode]:
    """The cells of the notebook, in order. An exercise's code is folded away, as its answer is."""
    page, end, answering = _HOW_TO_OPEN.sub("", page), 0, False
    for block in _BLOCK.finditer(page):
        between = page[end : block.start()]
        if text := words(between, answering):
            yield new_markdown_cell(text)
        opened, closed = between.rfind("<details>"), between.rfind("</details>")
        answering = opened > closed or (answering and closed < 0)
        yield new_code_cell(
            block["code"].strip(), metadata={"jupyter": {"source_hidden": True}} if answering else {}
        )
        end = block.end()
    yield new_markdown_cell(words(page[end:], answering))


def notebook_of(page: str) -> nbformat.NotebookNode:
    """The notebook, not yet run."""
    notebook = new_notebook(cells=list(cells(page)))
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index:02}"
    return notebook


def run(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run it in ``folder``. Raises ``CellExecutionError`` where a block fails."""
    NotebookClient(
        notebook,
        timeout=600,
        kernel_manager_class=ThisInterpreter,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    ).execute(env=os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"})


def printed(cell: nbformat.NotebookNode) -> str:
    """What a cell wrote to standard output."""
    return "".join(output.text for output in cell.get("outputs", []) if output.get("name") == "stdout")


def drawn(cell: nbformat.NotebookNode) -> list[bytes]:
    """The pictures of a cell, as PNG files."""
    found = [output.get("data", {}).get("image/png") for output in cell.get("outputs", [])]
    return [base64.b64decode(picture) for picture in found if picture]


def with_outputs(page: str, notebook: nbformat.NotebookNode) -> str:
    """The page, with what each block printed under it."""
    ran = iter(codes(notebook))

    def block(match: re.Match[str]) -> str:
        text = printed(next(ran))
        return (
            f"```python\n{match['code']}```\n"
            + (f"\n```text\n{text}```\n" if text else "")
            + (match[3] or "")
        )

    return _BLOCK.sub(block, page)


def codes(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Its code cells."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def main(again: bool) -> None:
    """Run the page's blocks, unless only words have changed; write notebook, page and pictures."""
    page = PAGE.read_text("utf-8")
    notebook, stored = notebook_of(page), nbformat.read(NOTEBOOK, as_version=4)
    if again or [cell.source for cell in codes(notebook)] != [cell.source for cell in codes(stored)]:
        run(notebook, NOTEBOOK.parent)
    else:
        for cell, ran in zip(codes(notebook), codes(stored), strict=True):
            cell.outputs, cell.execution_count = ran.outputs, ran.execution_count
    pictures = [picture for cell in notebook.cells for picture in drawn(cell)]
    for number, picture in enumerate(pictures, 1):
        (PAGE.parent / "pictures" / f"learn-{number}.png").write_bytes(picture)
    nbformat.write(notebook, NOTEBOOK)
    PAGE.write_text(with_outputs(page, notebook), "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true", help="run the blocks though none has changed")
    main(again=parser.parse_args().run)
