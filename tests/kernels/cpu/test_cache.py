"""A kernel kept on disk is run only if it is whole, and nobody but this user can have written it."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import gammabeta
from gammabeta.kernels.cpu import cache

# Damages the kept files in a hundred ways, and loads and runs the kernels after each; what would be compiled
# again is taken from memory, because only the loading is looked at.
PROGRAM = """
import random, sys, torch
from gammabeta.kernels.cpu import compiler, host, launch

compiled, compile_ = {}, compiler.machine_code
def again(key):
    if key not in compiled:
        compiled[key] = compile_(key)
    return compiled[key]
compiler.machine_code = again
x = torch.arange(12.0).view(3, 4)

def check():
    mean, var = host.statistics(x)
    assert mean.tolist() == [4.0, 5.0, 6.0, 7.0], mean
    assert abs(var[0].item() - 32 / 3) < 1e-5, var

check()
draw = random.Random(20150211)
paths = sorted(compiler.cache_directory().glob("*.o"))
whole = {path: path.read_bytes() for path in paths}
for turn in range(100):
    path = paths[turn % len(paths)]
    content = bytearray(whole[path])
    place = draw.randrange(len(content))
    how = ("cut", "flip", "zero", "tail", "swap", "grow")[draw.randrange(6)]
    if how == "cut":
        del content[draw.choice([0, place]):]
    elif how == "flip":
        content[place] ^= 1 << draw.randrange(8)
    elif how == "zero":
        content[place:] = bytes(len(content) - place)
    elif how == "tail":
        content[-64:] = draw.randbytes(64)
    elif how == "swap":
        content = whole[paths[(turn + 1) % len(paths)]]
    else:
        content += b"more"
    path.write_bytes(content)
    compiler._addresses.clear()
    launch._kernels.clear()
    check()
    assert path.read_bytes() == whole[path], (how, path)
print("done")
"""


def run(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    paths = {"NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": str(Path(gammabeta.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-c", program], env=os.environ | paths, capture_output=True, text=True, check=False
    )


def test_damaged_files_are_compiled_anew_and_said_once(tmp_path):
    done = run(tmp_path, PROGRAM)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    first, second = done.stderr.splitlines()
    assert "once per machine" in first
    assert "anew" in second
    assert "is damaged" in second


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Each test as in a process of its own."""
    monkeypatch.setattr(cache, "_told", set())
    for cached in (cache.blocked, cache._unwritable):
        cached.cache_clear()


@pytest.fixture
def kept(tmp_path):
    path = tmp_path / "cache" / "kernel.o"
    path.parent.mkdir(mode=0o700)
    cache.keep(path, b"code")
    assert cache.read(path) == b"code"
    assert path.stat().st_mode & 0o777 == 0o600
    return path


needs_owners = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no such owners here")


@needs_owners
@pytest.mark.parametrize("place", ["file", "folder", "both"])
def test_what_another_user_owns_is_refused(kept, monkeypatch, capsys, place):
    mine, other = os.geteuid(), os.geteuid() + 1
    if mine == 0:
        for path in {"file": [kept], "folder": [kept.parent], "both": [kept, kept.parent]}[place]:
            os.chown(path, other, -1)
    else:  # only root can give files away
        monkeypatch.setattr(os, "geteuid", lambda: other)
    cache.blocked.cache_clear()
    assert cache.read(kept) is None
    cache.tell_compiling(kept.parent)
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "belongs to another user" in told
    assert mine or ("at each start" in told) == (place != "file")


@needs_owners
@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_file_that_others_can_write_is_refused(kept, capsys, mode):
    kept.chmod(mode)
    assert cache.read(kept) is None
    cache.tell_compiling(kept.parent)
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"{kept} can be written by other users" in told
    cache.keep(kept, b"code")
    assert cache.read(kept) == b"code"


@needs_owners
@pytest.mark.parametrize("mode", [0o770, 0o777, 0o1777])
def test_folder_that_others_can_write_is_closed_and_what_lay_in_it_refused(kept, capsys, mode):
    kept.parent.chmod(mode)
    cache.blocked.cache_clear()
    assert cache.read(kept) is None
    cache.tell_compiling(kept.parent)
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "others could write in" in told
    assert kept.parent.stat().st_mode & 0o777 == 0o700
    assert list(kept.parent.iterdir()) == []


@needs_owners
def test_new_folder_is_closed_to_others_whatever_the_mask(tmp_path):
    mask = os.umask(0)
    try:
        path = tmp_path / "new" / "kernels" / "kernel.o"
        cache.keep(path, b"code")
    finally:
        os.umask(mask)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert cache.read(path) == b"code"


def test_what_is_no_file_is_refused(tmp_path, capsys):
    path = tmp_path / "cache" / "kernel.o"
    path.mkdir(parents=True, mode=0o700)
    assert cache.read(path) is None
    if hasattr(os, "mkfifo"):
        pipe = path.with_name("pipe.o")
        os.mkfifo(pipe)
        assert cache.read(pipe) is None
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("why", ["No space left on device", "Read-only file system"])
def test_cache_that_cannot_be_written_is_said_to_be_so(tmp_path, monkeypatch, capsys, why):
    def refuse(*_args, **_options):
        raise OSError(28, why)

    monkeypatch.setattr(cache.tempfile, "mkstemp", refuse)
    monkeypatch.setattr(cache.tempfile, "TemporaryFile", refuse)
    cache.tell_compiling(tmp_path / "cache")
    cache.keep(tmp_path / "cache" / "kernel.o", b"code")
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "at each start" in told
    assert why in told
    assert "once per machine" not in told


def test_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    def refuse(_handle):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(cache.os, "fsync", refuse)
    cache.keep(tmp_path / "cache" / "kernel.o", b"code")
    assert list((tmp_path / "cache").iterdir()) == []
    assert "at each start" in capsys.readouterr().err


def test_name_of_the_folder_is_no_control_sequence(tmp_path, capsys):
    cache.tell_compiling(tmp_path / "a\x1b[31mb")
    assert r"a\x1b[31mb" in capsys.readouterr().err


def test_hushed_only_what_goes_wrong_is_told(kept, monkeypatch, capsys):
    cache.hush()
    cache.tell_compiling(kept.parent)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(cache, "_unwritable", lambda directory: "no space left")
    cache.tell_compiling(kept.parent)
    assert "no space left" in capsys.readouterr().err


def test_of_two_processes_that_want_a_kernel_one_compiles(tmp_path):
    code = """
import torch
from gammabeta.kernels.cpu import compiler, host
made, machine_code = [], compiler.machine_code
compiler.machine_code = lambda key: made.append(key.slug) or machine_code(key)
host.statistics(torch.ones(3, 4))
print(*made)
"""
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: run(tmp_path, code), range(2)))
    made = " ".join(one.stdout for one in done).split()
    assert made, done
    assert len(set(made)) == len(made)
    assert not list(tmp_path.rglob("*.lock"))
