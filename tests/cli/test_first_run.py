"""The first training on a machine, watched: kernels are counted; no figure is shown before there is one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gammabeta.kernels.cpu.compiler import cache_directory

pty = pytest.importorskip("pty")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[[\d;]*m")  # within a line


def watched(command: list[str], columns: int, **environment: str) -> list[str]:
    """What a terminal of so many columns is shown, line by line; a bar that is drawn again is one more."""
    ours, theirs = pty.openpty()
    more = {"COLUMNS": str(columns), "TERM": "xterm", "OMP_NUM_THREADS": "1", **environment}
    with subprocess.Popen(
        [sys.executable, "-m", "gammabeta", *command],
        stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, **more},
    ) as child:  # fmt: skip
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 1 << 16):
                shown += part
        except OSError:  # the other side is closed
            pass
        finally:
            os.close(ours)
    assert child.returncode == 0, shown
    return CONTROL.sub("\n", COLOUR.sub("", shown.decode())).replace("\r", "\n").split("\n")


@pytest.mark.parametrize("cache", ["with some", pytest.param("empty", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("trained_run")  # its kernels are in this machine's cache
def test_a_narrow_terminal_and_missing_kernels(digits_file: Path, tmp_path: Path, cache: str) -> None:
    kernels = tmp_path / "kernels" / "gammabeta"
    if cache == "with some":
        shutil.copytree(cache_directory(), kernels)
        for file in kernels.glob("*f32-relu-pool*"):
            file.unlink()
    there = set(kernels.glob("*.o"))
    run = ["train", str(digits_file), "-o", str(tmp_path / "run"), "--precision", "fp32", "--epochs", "8"]
    lines = watched(run, 50, NUMBA_CACHE_DIR=str(tmp_path / "kernels"))
    text = "\n".join(lines)
    assert "nan" not in text.lower()
    assert not re.search(r"(?<![\d,.])0 images/s|(?<![\d,.])0/s", text)
    counts = re.findall(r"compiling kernel (\d+) of (\d+)", text)
    many = {int(whole) for _, whole in counts}
    assert len(many) == 1
    assert {int(number) for number, _ in counts} <= set(range(1, max(many) + 1))
    made = set(kernels.glob("*.o")) - there
    assert len(made) == max(many), "another kernel was compiled later, or one that is not needed"
    bars = [line for line in lines if "━" in line]
    assert any(re.search(r"loss \d\.\d{3} acc 0\.\d{3} [\d,]+/s", line) for line in bars)
    assert max(map(len, bars)) <= 50
