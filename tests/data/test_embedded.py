"""MNIST inside the package is MNIST, small, and rebuilt to the same bytes."""

import gzip
import hashlib
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from gammabeta.data import load
from gammabeta.data.catalog import MNIST_FOLDER
from gammabeta.errors import DataError
from scripts.build_mnist import MNIST_MD5

same_zlib = pytest.mark.skipif("ng" in zlib.ZLIB_RUNTIME_VERSION, reason="zlib-ng packs to other bytes")


@pytest.mark.parametrize("name", MNIST_MD5)
def test_each_file_unpacks_to_the_published_original(name):
    raw = gzip.decompress((MNIST_FOLDER / f"{name}.gz").read_bytes())
    assert hashlib.md5(raw, usedforsecurity=False).hexdigest() == MNIST_MD5[name]


def test_the_files_take_at_most_twelve_megabytes():
    files = sorted(path.name for path in MNIST_FOLDER.iterdir())
    assert files == sorted(f"{name}.gz" for name in MNIST_MD5)
    assert sum(path.stat().st_size for path in MNIST_FOLDER.iterdir()) <= 12_000_000


@same_zlib
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * ("images" in name)) for name in MNIST_MD5],
)
def test_packing_again_gives_the_same_bytes(name, script):
    packed = (MNIST_FOLDER / f"{name}.gz").read_bytes()
    assert script("build_mnist").pack(gzip.decompress(packed)) == packed


def test_build_refuses_other_files_and_writes_nothing(script, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in MNIST_MD5:
        (source / name).write_bytes(b"not MNIST")
    with pytest.raises(DataError, match="the original's is"):
        script("build_mnist").build(source, target)
    assert not target.exists()


def test_loaded_arrays(mnist):
    assert mnist.name == "mnist"
    assert mnist.classes == tuple("0123456789")
    assert mnist.image_shape == (1, 28, 28)
    for split, count in ((mnist.train, 60_000), (mnist.test, 10_000)):
        assert split.images.shape == (count, 1, 28, 28)
        assert split.images.dtype == np.uint8
        assert split.images.flags.c_contiguous
        assert split.images.flags.writeable
        assert split.labels.shape == (count,)
        assert split.labels.dtype == np.int64
    # The label counts that the database's description gives for its first and second file.
    assert np.bincount(mnist.train.labels).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    assert np.bincount(mnist.test.labels).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip


def test_a_damaged_file_is_told_by_its_checksum(tmp_path, monkeypatch):
    for path in MNIST_FOLDER.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    victim = tmp_path / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(victim.read_bytes())
    content[-6] ^= 1  # the stored checksum
    victim.write_bytes(content)
    monkeypatch.setattr("gammabeta.data.catalog.MNIST_FOLDER", tmp_path)
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\.gz: damaged gzip data"):
        load("mnist")


def test_loading_imports_no_torch():
    code = "import sys, gammabeta as gb; gb.data.load('mnist'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert Path(MNIST_FOLDER).is_dir()
