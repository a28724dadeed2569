"""``gammabeta lab``: its errors are one line."""

import importlib.util
from pathlib import Path

import pytest

from gammabeta.cli import lab
from gammabeta.cli.app import run


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["lab", "--no-open", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


def test_the_extra_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(lab, "find_spec", lambda name: None)
    assert "gammabeta" in error(capsys)
    monkeypatch.setattr(lab, "find_spec", lambda name: None if name == "uvicorn" else object())
    said = error(capsys)
    assert "uvicorn" in said
    assert '".[lab]"' in said


@pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="the extra lab is not installed")
def test_what_is_no_run(capsys, tmp_path: Path):
    assert "nowhere" in error(capsys, str(tmp_path / "nowhere"))
    assert "--help" in error(capsys, "--port", "70000")
