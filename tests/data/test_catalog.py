"""The names, and what stands behind each."""

import gzip
import hashlib
import io
import tarfile
import zipfile

import numpy as np
import pytest

from gammabeta.data import Dataset, Split, known_names, load, picture_style, write_idx
from gammabeta.data.archives import CIFAR10_FOLDER, read_cifar10, read_emnist_letters
from gammabeta.data.catalog import KNOWN
from gammabeta.data.download import RemoteFile
from gammabeta.errors import DataError

RANDOM = np.random.default_rng(11)


def test_names():
    names = known_names()
    assert list(names) == ["mnist", "fashion-mnist", "kmnist", "emnist-letters", "cifar10"]
    for about in names.values():
        assert "\n" not in about
        assert "classes" in about


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(DataError, match="names are mnist, fashion-mnist, kmnist, emnist-letters, cifar10"):
        load("minst")


def test_every_download_is_pinned_and_has_mirrors():
    for known in KNOWN.values():
        for file in known.files:
            assert len(bytes.fromhex(file.sha256)) == 32
            assert file.size > 0
            assert len({url.split("/")[2] for url in file.urls}) >= 2
            assert all(file.name == url.rpartition("/")[2] for url in file.urls)


def test_style_of_pictures():
    assert picture_style("mnist", 1) == "digit"
    assert picture_style("fashion-mnist", 1) == "object"
    assert picture_style("cifar10", 3) == "plain"
    assert picture_style("somebody's own", 1) == "plain"


def test_a_named_data_set_is_read_from_files_put_into_the_cache(tmp_path, monkeypatch, arrays):
    """What the error message tells people to do works, without a network."""
    folder, files = tmp_path / "fashion-mnist", []
    folder.mkdir()
    for name, items in arrays.items():
        write_idx(folder / "raw", items)
        content = gzip.compress((folder / "raw").read_bytes())
        (folder / "raw").unlink()
        (folder / f"{name}.gz").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        files.append(RemoteFile(f"{name}.gz", len(content), digest, ("http://127.0.0.1:9/none",)))
    known = KNOWN["fashion-mnist"]
    monkeypatch.setitem(KNOWN, "fashion-mnist", type(known)("", "object", tuple(files), known.read))
    monkeypatch.setenv("GAMMABETA_CACHE", str(tmp_path))
    found = load("fashion-mnist")
    assert found.name == "fashion-mnist"
    assert found.classes[9] == "Ankle boot"
    np.testing.assert_array_equal(found.train.images[:, 0], arrays["train-images-idx3-ubyte"])


def batch(count: int, label: int = 3) -> bytes:
    records = RANDOM.integers(0, 256, (count, 3073), np.uint8)
    records[:, 0] = label
    return records.tobytes()


def tar(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def cifar(tmp_path):
    members = {f"{CIFAR10_FOLDER}/data_batch_{number}.bin": batch(4, number) for number in range(1, 6)}
    members |= {f"{CIFAR10_FOLDER}/test_batch.bin": batch(4), f"{CIFAR10_FOLDER}/readme.html": b"<html>"}
    tar(tmp_path / "cifar.tar.gz", members)
    return tmp_path / "cifar.tar.gz", members


def test_cifar10(cifar):
    path, members = cifar
    found = read_cifar10(path, per_batch=4)
    assert found.image_shape == (3, 32, 32)
    assert found.classes[3] == "cat"
    assert found.train.labels.tolist() == np.repeat(range(1, 6), 4).tolist()
    first = members[f"{CIFAR10_FOLDER}/data_batch_1.bin"]
    assert found.train.images[0].tobytes() == first[1:3073]
    assert found.test.images.flags.writeable


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_batch.bin": None}, r"test_batch\.bin not found in it"),
        ({"data_batch_2.bin": batch(3)}, "has 9219 bytes, not 12292"),
        ({"data_batch_2.bin": batch(4, 10)}, "a training label is 10"),
    ],
)
def test_damaged_cifar10(tmp_path, cifar, change, message):
    _, members = cifar
    members |= {f"{CIFAR10_FOLDER}/{name}": content for name, content in change.items()}
    tar(tmp_path / "bad.tar.gz", {name: content for name, content in members.items() if content is not None})
    with pytest.raises(DataError, match=message):
        read_cifar10(tmp_path / "bad.tar.gz", per_batch=4)


@pytest.mark.parametrize("keep", [0, 5, 500, 20_000, -9])
def test_cut_cifar10(cifar, keep):
    path, _ = cifar
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"cifar\.tar\.gz"):
        read_cifar10(path, per_batch=4)


def emnist(path, images, labels):
    with zipfile.ZipFile(path, "w") as archive:
        for part in ("train", "test"):
            for kind, items in ((f"{part}-images-idx3", images), (f"{part}-labels-idx1", labels)):
                write_idx(path.with_suffix(".idx"), items)
                name = f"gzip/emnist-letters-{kind}-ubyte.gz"
                archive.writestr(name, gzip.compress(path.with_suffix(".idx").read_bytes()))


def test_emnist_letters_stand_upright_and_count_from_zero(tmp_path):
    images = RANDOM.integers(0, 256, (26, 28, 28), np.uint8)
    emnist(tmp_path / "gzip.zip", images, np.arange(1, 27, dtype=np.uint8))
    found = read_emnist_letters(tmp_path / "gzip.zip")
    np.testing.assert_array_equal(found.train.images[:, 0], images.transpose(0, 2, 1))
    assert found.train.images.flags.c_contiguous
    assert found.train.labels.tolist() == list(range(26))
    assert found.classes[0] == "A"


@pytest.mark.parametrize(
    ("labels", "message"),
    [(np.zeros(4, np.uint8), "a training label is -1"), (np.ones(3, np.uint8), "expected 4 of int64")],
)
def test_damaged_emnist(tmp_path, labels, message):
    emnist(tmp_path / "gzip.zip", np.zeros((4, 28, 28), np.uint8), labels)
    with pytest.raises(DataError, match=message):
        read_emnist_letters(tmp_path / "gzip.zip")


@pytest.mark.parametrize(
    ("content", "message"), [(b"zip?", "not an intact zip file"), (None, "not found in it")]
)
def test_emnist_that_is_none(tmp_path, content, message):
    path = tmp_path / "gzip.zip"
    if content is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme", "")
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_emnist_letters(path)


IMAGES, LABELS = np.zeros((2, 1, 3, 3), np.uint8), np.zeros(2, np.int64)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (IMAGES.astype(np.float32), LABELS),
        (IMAGES[:, 0], LABELS),
        (IMAGES.transpose(0, 3, 2, 1)[:, ::-1], LABELS),
        (IMAGES, LABELS[:1]),
        (IMAGES, LABELS.astype(np.int32)),
        (IMAGES[:0], LABELS[:0]),
        (np.zeros((1, 1, 1, 5000), np.uint8), LABELS[:1]),
    ],
)
def test_a_split_holds_what_it_promises(images, labels):
    with pytest.raises(DataError):
        Split(images, labels)


def test_a_dataset_needs_a_name_for_every_label():
    split = Split(IMAGES, LABELS)
    assert len(Dataset("x", split, split, ("a",)).train) == 2
    with pytest.raises(DataError, match="0 classes"):
        Dataset("x", split, split, ())
