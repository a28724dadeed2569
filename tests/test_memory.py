"""Memory is estimated before it is asked for, and its lack is one line."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gammabeta import memory
from gammabeta.cli.app import run
from gammabeta.data import Preparation, load
from gammabeta.data.decode import MAX_DECODING
from gammabeta.errors import DataError


def test_what_is_free_is_known_here():
    free = memory.available()
    assert free is None or 0 < free < 1 << 50
    assert memory.lacking(1) is None
    if free is not None:
        assert "GB of memory, and " in str(memory.lacking(1e15))


@pytest.mark.parametrize(
    ("names", "stat", "free"),
    [
        (("memory.max", "memory.current"), "anon 5\ninactive_file 300\n", 700),
        (
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
            "inactive_file 1\ntotal_inactive_file 300\n",
            700,
        ),
    ],
)
def test_a_container_s_limit_counts(tmp_path, monkeypatch, names, stat, free):
    for name, value in zip((*names, "memory.stat"), ("1000", "600", stat), strict=True):
        (tmp_path / name).write_text(value, "ascii")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    assert memory.available() == free
    (tmp_path / names[0]).write_text("max", "ascii")
    assert memory.available() != free


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((10**12,), np.dtype(np.uint8)),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_out_of_memory_is_one_line_with_exit_code_2(error, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("gammabeta.train.provenance.machine", fail)
    assert run(["info"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "out of memory" in shown


def test_other_errors_stay_bugs(monkeypatch):
    def fail():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("gammabeta.train.provenance.machine", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        run(["info"])


@pytest.fixture
def phone(tmp_path):
    """Photographs as telephones make them, of which only the header is large."""
    for name in ("a/1", "a/2", "b/1", "b/2"):
        path = tmp_path / "photos" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("L", (1200, 900), 30 if name[0] == "a" else 60)
        image.putpixel((3, 3), 200)
        image.save(path)
    return tmp_path / "photos"


def test_a_network_that_cannot_be_held_names_the_option(phone, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gammabeta.memory.available", lambda: 1_000_000_000)
    whole = ["--recipe", "fast", "--image-size", "900x1200"]
    assert run(["train", str(phone), "--out", str(tmp_path / "run"), "--quiet", *whole]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "images of 900×1200 make a network of 1.7 GB" in line
    assert "--image-size" in line
    assert not (tmp_path / "run").exists()
    assert run(["train", str(phone), "--out", str(tmp_path / "run"), "--quiet", "--image-size", "16x16"]) == 0


def test_pictures_that_cannot_be_held_are_not_decoded(phone, monkeypatch):
    monkeypatch.setattr("gammabeta.memory.available", lambda: 4_000_000)
    monkeypatch.setattr("gammabeta.data.preparation.decode", None)
    with pytest.raises(DataError, match=r"4 images of 900×1200 do not fit .*--image-size"):
        load(phone, size=(900, 1200))


def test_large_images_are_evaluated_few_at_a_time():
    from gammabeta.train.evaluate import EVALUATION_BATCH, evaluation_batch

    assert evaluation_batch(28, 28) == evaluation_batch(32, 32) == EVALUATION_BATCH
    assert evaluation_batch(128, 128) == 31
    assert evaluation_batch(4096, 4096) == 1


def peak_of(code: str) -> float:
    """Megabytes that a process holds at its highest."""
    tail = "\nprint(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1]) / 1000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak of a process")
@pytest.mark.parametrize(
    ("mode", "size", "suffix"),
    [("RGB", (7000, 5000), "png"), ("RGBA", (7000, 5000), "png"), ("RGB", (12000, 9000), "jpg")],
)
def test_large_photographs_are_read_in_bounded_memory(mode, size, suffix, tmp_path):
    path, options = tmp_path / f"large.{suffix}", {"compress_level": 1} if suffix == "png" else {}
    Image.new(mode, size, (90, 30, 200, 255)[: len(mode)]).save(path, **options)
    code = (
        "from gammabeta.data import Preparation\n"
        f"picture = Preparation(3, 32, 32).prepare({str(path)!r})\n"
        "assert abs(int(picture[2].max()) - 200) < 4, picture.max()"
    )
    assert peak_of(code) < (MAX_DECODING / 1e6 + 100 if suffix == "png" else 200)


@pytest.mark.parametrize(("free", "most"), [(None, "400 MB"), (10**9, "400 MB"), (3 * 10**9, "750 MB")])
def test_a_picture_beyond_the_bound_is_one_line(tmp_path, monkeypatch, free, most):
    monkeypatch.setattr("gammabeta.data.decode.available", lambda: free)
    Image.new("RGB", (10000, 10000)).save(tmp_path / "x.png", compress_level=1)
    with pytest.raises(
        DataError, match=rf"10000×10000 pixels take 800 MB to decode; up to {most} are allowed"
    ):
        Preparation(3, 32, 32).prepare(tmp_path / "x.png")


@pytest.mark.parametrize(("free", "read"), [(10**9, False), (10**10, True)])
def test_webp_of_many_pixels_is_read_where_there_is_room(tmp_path, monkeypatch, free, read):
    monkeypatch.setattr("gammabeta.data.decode.available", lambda: free)
    Image.new("RGB", (6000, 4500), (90, 30, 200)).save(tmp_path / "x.webp", method=0)
    with nullcontext() if read else pytest.raises(DataError, match="up to 400 MB are allowed"):
        assert abs(int(Preparation(3, 32, 32).prepare(tmp_path / "x.webp")[2].max()) - 200) < 8


def test_pillow_s_own_limit_is_as_it_was(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    Image.new("L", (9, 9)).save(tmp_path / "x.png")
    Preparation(1, 9, 9).prepare(tmp_path / "x.png")
    assert before == Image.MAX_IMAGE_PIXELS
