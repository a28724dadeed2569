"""The notebook is the page *Batch normalization explained*, and runs."""

from pathlib import Path

import nbformat
import pytest

from scripts import learn_notebook as learn

PAGE = learn.PAGE.read_text("utf-8")
STORED = nbformat.read(learn.NOTEBOOK, as_version=4)
PICTURES = learn.PAGE.parent / "pictures"


def test_the_notebook_is_the_page_and_its_outputs_stand_on_it() -> None:
    """If this fails: `python -m scripts.learn_notebook`."""
    made = learn.notebook_of(PAGE)
    assert [(cell.cell_type, cell.source) for cell in STORED.cells] == [
        (cell.cell_type, cell.source) for cell in made.cells
    ]
    assert learn.with_outputs(PAGE, STORED) == PAGE
    drawn = [picture for cell in STORED.cells for picture in learn.drawn(cell)]
    assert drawn == [(PICTURES / f"learn-{number}.png").read_bytes() for number in (1, 2)]


def test_every_answer_is_folded_away() -> None:
    for cell in STORED.cells:
        assert cell.source.count("<details>") == cell.source.count("</details>")
    hidden = [cell for cell in STORED.cells if cell.metadata.get("jupyter", {}).get("source_hidden")]
    assert len(hidden) == PAGE.count("<details>") == 5


@pytest.mark.slow  # its blocks run by default, as the page's: tests/docs/test_snippets.py
@pytest.mark.filterwarnings("default")  # of the Jupyter client's event loop, not of ours
def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = learn.notebook_of(PAGE)
    learn.run(notebook, tmp_path)
    for ran, stored in zip(notebook.cells, STORED.cells, strict=True):
        assert bool(learn.printed(ran)) == bool(learn.printed(stored)), ran.source
        assert len(learn.drawn(ran)) == len(learn.drawn(stored)), ran.source
