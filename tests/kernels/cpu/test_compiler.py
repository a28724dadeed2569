"""Compiled kernels: kept on disk, loaded without Numba, never stale, no worse without a place to write."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gammabeta
from gammabeta.kernels.cpu import compiler
from gammabeta.kernels.cpu.registry import Key

PROGRAM = """
import sys, torch
from gammabeta.kernels import cpu
mean, var = cpu.statistics(torch.arange(12.0).view(3, 4))
assert mean.tolist() == [4.0, 5.0, 6.0, 7.0], mean
assert abs(var[0].item() - 32 / 3) < 1e-5, var
print("numba" in sys.modules)
"""


def run(cache: Path) -> subprocess.CompletedProcess[str]:
    environment = dict(
        os.environ, NUMBA_CACHE_DIR=str(cache), PYTHONPATH=str(Path(gammabeta.__file__).parents[1])
    )
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )


def test_first_process_compiles_with_one_message_and_the_next_needs_no_numba(tmp_path):
    first = run(tmp_path)
    assert first.stderr.count("gammabeta: compiling") == 1
    assert str(tmp_path) in first.stderr
    assert first.stdout.strip() == "True"
    files = sorted(path.name for path in (tmp_path / "gammabeta").iterdir())
    assert [name.rsplit("-", 1)[0] for name in files] == [
        "finish_statistics-f32-linear",
        "rows_statistics-f32-linear",
    ]
    second = run(tmp_path)
    assert second.stderr == ""
    assert second.stdout.strip() == "False"


def test_cache_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert run(blocked).stdout.strip() == "True"


def test_source_is_part_of_the_name(monkeypatch):
    before = compiler._fingerprint()
    compiler._fingerprint.cache_clear()
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **how: read(path, **how) + "\n# changed")
    assert compiler._fingerprint() != before
    compiler._fingerprint.cache_clear()


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert compiler.cache_directory() == tmp_path / "gammabeta"
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    assert compiler.cache_directory().name == "kernels"


@pytest.mark.parametrize("field", ["bf16", "residual", "pool"])
def test_every_option_is_part_of_the_name(field):
    assert Key("rows_forward").slug != Key("rows_forward", **{field: True}).slug
