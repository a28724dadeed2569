"""Python blocks in documents and docstring examples run; relative links lead somewhere."""

import doctest
import importlib
import pkgutil
import re
import warnings
from pathlib import Path

import pytest

import gammabeta
from gammabeta.errors import UnavailableError

ROOT = Path(__file__).parents[2]
MADE = ROOT / "docs" / "results"  # copies, by the site's build
PAGES = [path for path in sorted((ROOT / "docs").rglob("*.md")) if MADE not in path.parents]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
BLOCK = re.compile(r"^```python[ \t]*(?P<info>[^\n]*)\n(?P<code>.*?)^```", re.M | re.S)
LINK = re.compile(r"\]\((?!https?:|mailto:|#)(?P<target>[^)#\s]+)")
MODULES = sorted(
    m.name for m in pkgutil.walk_packages(gammabeta.__path__, "gammabeta.") if "__main__" not in m.name
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_python_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    text = path.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        info = block["info"].strip()
        if info:
            assert re.fullmatch(r"no-run: .+", info), (
                f"{name(path)}: say why a block does not run, not {info!r}"
            )
            continue
        line = text.count("\n", 0, block.start()) + 1
        exec(compile("\n" * line + block["code"], str(path), "exec"), namespace)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_relative_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    missing = [m["target"] for m in LINK.finditer(text) if not (path.parent / m["target"]).exists()]
    assert not missing


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module: str) -> None:
    try:
        with warnings.catch_warnings():  # other libraries' own, when they are imported
            warnings.simplefilter("ignore", DeprecationWarning)
            found = importlib.import_module(module)
    except UnavailableError as error:  # it is for the users of a library that is not installed
        pytest.skip(str(error))
    assert doctest.testmod(found).failed == 0
