"""Every notebook runs from top to bottom, with the interpreter that runs the tests."""

import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


class ThisInterpreter(AsyncKernelManager):
    """Starts the kernel with ``sys.executable``, whatever kernels are registered on the machine."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])


@pytest.mark.filterwarnings("default")  # of the Jupyter client's event loop, not of ours
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=120,
        kernel_manager_class=ThisInterpreter,
        resources={"metadata": {"path": tmp_path}},
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    line = next(text for output in outputs if "Test_acc" in (text := output.get("text", "")))
    assert float(line.split("Test_acc")[1]) > 0.9


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS
