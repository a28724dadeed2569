"""The examples of the page *Integrate* run, each where its package is installed."""

import importlib
import re
from pathlib import Path

import pytest

from benchmarks.foreign.stub import import_timm

PAGE = Path(__file__).parents[2] / "docs" / "integrate.md"
BLOCK = re.compile(r"^```python(?: no-run: needs (?P<needs>[^\n]+))?\n(?P<code>.*?)^```", re.M | re.S)
MODULES = {"Lightning": "pytorch_lightning", "Ignite": "ignite.engine"}  # others are named as their module
BLOCKS = list(BLOCK.finditer(PAGE.read_text("utf-8")))
EXAMPLES = [
    pytest.param(block, id=block["needs"], marks=[pytest.mark.slow] if block["needs"] == "timm" else [])
    for block in BLOCKS
    if block["needs"]
]

pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's code


def bring(name):
    """Import a package, or skip; timm does without torchvision."""
    try:
        import_timm() if name == "timm" else importlib.import_module(MODULES.get(name, name))
    except ImportError as error:
        pytest.skip(f"{name} is not installed: {error}")


@pytest.mark.parametrize("block", EXAMPLES)
def test_example_runs(block, tmp_path, monkeypatch):
    for name in block["needs"].split(", "):
        bring(name)
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for part in (BLOCKS[0]["code"], block["code"]):
        exec(compile(part, PAGE.name, "exec"), namespace)
    ready = namespace["folded" if "folded" in namespace else "ready"]
    assert {layer.outcome for layer in ready.fold_report.layers} <= {"folded", "guarded"}


def test_every_example_says_what_it_needs():
    assert len(EXAMPLES) == 6
    assert not BLOCKS[0]["needs"]
