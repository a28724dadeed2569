"""Compiled kernels: kept on disk, loaded without Numba, never stale, no worse without a place to write."""

import ast
import os
import struct
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple

import pytest

import gammabeta
from gammabeta.kernels.cpu import compiler, prepared
from gammabeta.kernels.cpu.arguments import packer
from gammabeta.kernels.cpu.registry import Key

PROGRAM = """
import sys, torch
from gammabeta.kernels.cpu import host, prepared
if sys.argv[1] == "none shipped":
    prepared.find = lambda key, llvm: None
mean, var = host.statistics(torch.arange(12.0).view(3, 4))
assert mean.tolist() == [4.0, 5.0, 6.0, 7.0], mean
assert abs(var[0].item() - 32 / 3) < 1e-5, var
print("numba" in sys.modules)
"""


def run(cache: Path, shipped: bool = False) -> subprocess.CompletedProcess[str]:
    environment = dict(
        os.environ, NUMBA_CACHE_DIR=str(cache), PYTHONPATH=str(Path(gammabeta.__file__).parents[1])
    )
    command = [sys.executable, "-c", PROGRAM, "shipped" if shipped else "none shipped"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)


@pytest.mark.parametrize("shipped", [True, False])
def test_first_process_compiles_with_one_message_and_the_next_needs_no_numba(tmp_path, shipped):
    if shipped and prepared.find(Key("finish_statistics"), compiler._llvm()) is None:
        pytest.skip("kernels are not shipped for this kind of machine")
    first = run(tmp_path, shipped)
    assert first.stderr.count("gammabeta: compiling") == 1
    assert str(tmp_path) in first.stderr
    assert first.stdout.strip() == str(not shipped)
    files = sorted(path.name for path in (tmp_path / "gammabeta").iterdir())
    assert [name.rsplit("-", 1)[0] for name in files] == [
        "channels_last_statistics-f32-linear",
        "finish_statistics-f32-linear",
    ]
    second = run(tmp_path)
    assert second.stderr == ""
    assert second.stdout.strip() == "False"


def test_cache_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    done = run(blocked)
    assert done.stdout.strip() == "True"
    assert done.stderr.count("\n") == 1
    assert "at each start" in done.stderr


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
    assert Key("channels_last_forward").slug != Key("channels_last_forward", **{field: True}).slug


@pytest.mark.parametrize(
    "name",
    ["channels_last_statistics", "channels_last_reduce", "channels_first_train", "channels_first_backward"],
)
def test_kernels_need_nothing_of_python(name, monkeypatch):
    """Whoever loads one has no Numba, whose symbols it could not find."""
    monkeypatch.setattr(prepared, "find", lambda key, llvm: None)
    code = compiler.machine_code(Key(name))
    assert b"PyErr" not in code
    assert b"numba_" not in code


def test_name_depends_on_all_that_kernels_import():
    """A file that kernels are made of, but no part of the name, would leave stale kernels when it changes."""
    root = Path(gammabeta.__file__).parent
    hashed = set(prepared.sources())
    for path in hashed:
        if path.parent.name != "jit":
            continue
        package = ".".join(("gammabeta", *path.relative_to(root).parent.parts))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                module = resolve_name("." * node.level + (node.module or ""), package)
                file = root.joinpath(*module.split(".")[1:]).with_suffix(".py")
                # What the host and the kernels must agree on; it changes no kernel by itself.
                assert file in hashed or module == "gammabeta.epilogue", (path, module)


class Mixed(NamedTuple):
    """A record as kernels have them."""

    count: int = 0
    scale: float = 0.5
    address: int = 0


def test_records_are_packed_by_name():
    pack = packer(Mixed)
    assert struct.unpack("=qdq", pack({"address": 7})) == (0, 0.5, 7)
    constants = Mixed(count=3, address=1)._asdict()
    assert struct.unpack("=qdq", pack({"address": 7, "scale": 2.0}, constants)) == (3, 2.0, 7)
    with pytest.raises(struct.error):
        pack({"adress": 7})
