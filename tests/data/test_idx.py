"""IDX files: what is right is read exactly, and each thing that can be wrong is told apart."""

import gzip
import os
import struct
import tracemalloc

import numpy as np
import pytest

from gammabeta.data import load, read_idx, write_idx
from gammabeta.errors import DataError

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def header(kind: int, *shape: int) -> bytes:
    return struct.pack(f">HBB{len(shape)}I", 0, kind, len(shape), *shape)


@pytest.mark.parametrize("packed", [False, True])
def test_folder_is_read_exactly(idx_folder, arrays, packed):
    if packed:
        for path in list(idx_folder.iterdir()):
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    found = load(idx_folder)
    assert found.name == "digits"
    assert found.classes == ("0", "1", "2")
    np.testing.assert_array_equal(found.train.images[:, 0], arrays[IMAGES])
    np.testing.assert_array_equal(found.train.labels, arrays[LABELS])
    np.testing.assert_array_equal(found.test.images[:, 0], arrays["t10k-images-idx3-ubyte"])
    np.testing.assert_array_equal(found.test.labels, arrays["t10k-labels-idx1-ubyte"])


def test_other_usual_names(idx_folder, arrays):
    for path in list(idx_folder.iterdir()):
        other = path.name.replace("t10k", "test").replace("-idx", ".idx")
        path.rename(path.with_name(f"letters-{other}"))
    np.testing.assert_array_equal(load(str(idx_folder)).train.images[:, 0], arrays[IMAGES])


def test_gzip_in_several_members_is_one_file(tmp_path):
    items = np.arange(10, dtype=np.uint8)
    write_idx(tmp_path / "labels", items)
    raw = (tmp_path / "labels").read_bytes()
    (tmp_path / "labels").write_bytes(gzip.compress(raw[:9]) + gzip.compress(raw[9:]))
    np.testing.assert_array_equal(read_idx(tmp_path / "labels", dimensions=1), items)


def test_items_can_be_written_to(idx_folder):
    # torch.from_numpy warns of arrays that may not be written.
    assert read_idx(idx_folder / IMAGES, dimensions=3).flags.writeable


BODY = bytes(24)
DAMAGED = {
    "empty": (b"", "the magic number need 4 bytes, found 0"),
    "text": (b"hello, world", "not an IDX file"),
    "type": (header(0x0D, 2, 3, 4) + BODY, "type float32"),
    "unknown type": (header(0x42, 2, 3, 4) + BODY, "not an IDX file"),
    "no dimensions": (header(0x08), "not an IDX file"),
    "labels for images": (header(0x08, 24) + BODY, "1 dimensions, but images have 3"),
    "header cut": (header(0x08, 2, 3, 4)[:9], "the dimensions need 12 bytes, found 5"),
    "cut": (header(0x08, 2, 3, 4) + BODY[1:], "40 bytes in all, but has 39"),
    "too long": (header(0x08, 2, 3, 4) + BODY + b"x", "40 bytes in all, but has 41"),
    "no images": (header(0x08, 0, 3, 4), "states a size of"),
    "no pixels": (header(0x08, 2, 0, 4), "states a size of"),
    "absurd side": (header(0x08, 1, 4_000_000_000, 1) + BODY, "sides go from 1 to 4096"),
    "absurd count": (header(0x08, 4_000_000_000, 28, 28) + BODY, "bytes in all, but has 40"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file_is_refused(tmp_path, case):
    content, message = DAMAGED[case]
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path, dimensions=3)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


PACKED = {
    "cut": (gzip.compress(header(0x08, 2, 3, 4) + BODY)[:-10], "gzip data are cut short"),
    "too few items": (gzip.compress(header(0x08, 2, 3, 4) + BODY[1:]), "its items need 24 bytes, found 23"),
    "too many items": (gzip.compress(header(0x08, 2, 3, 4) + BODY + b"x"), "left over after its last item"),
    "bytes behind it": (gzip.compress(header(0x08, 2, 3, 4) + BODY) + b"x", "damaged gzip data"),
    "claims more than it may": (gzip.compress(header(0x08, 65536, 256, 256) + BODY), "may unpack to"),
}


@pytest.mark.parametrize("case", PACKED)
def test_damaged_packed_file_is_refused(tmp_path, case):
    content, message = PACKED[case]
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_idx(path, dimensions=3)


def test_bomb_is_refused_before_memory_is_taken(tmp_path):
    # 300 MB of zeros in 300 kB: the header is honest, the packing is not plausible.
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(header(0x08, 300, 1000, 1000) + bytes(300_000_000), compresslevel=1))
    tracemalloc.start()
    with pytest.raises(DataError, match="may unpack to"):
        read_idx(path, dimensions=3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_missing_file_is_named(idx_folder):
    (idx_folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte \(or .*\.gz\) is missing"):
        load(idx_folder)


def test_two_files_of_a_kind_are_refused(idx_folder):
    (idx_folder / f"other-{IMAGES}").write_bytes(b"")
    with pytest.raises(DataError, match="several files could be train-images-idx3-ubyte"):
        load(idx_folder)


def test_raw_and_packed_of_one_file_are_no_conflict(idx_folder):
    (idx_folder / f"{IMAGES}.gz").write_bytes(b"never opened")
    assert len(load(idx_folder).train) == 12


@pytest.mark.parametrize(
    ("name", "items", "message"),
    [
        (LABELS, np.zeros(11, np.uint8), "11 labels for 12 train images"),
        ("t10k-labels-idx1-ubyte", np.full(5, 9, np.uint8), "a test label is 9, which no training image has"),
        (
            "t10k-images-idx3-ubyte",
            np.zeros((5, 5, 5), np.uint8),
            "training images are 1×6×5, test images 1×5×5",
        ),
    ],
)
def test_files_that_do_not_fit_together(idx_folder, name, items, message):
    write_idx(idx_folder / name, items)
    with pytest.raises(DataError, match=message):
        load(idx_folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a plain file"):
        read_idx(tmp_path / "pipe", dimensions=1)


@pytest.mark.parametrize("path", ["nowhere", "nul\0byte", "x" * 5000])
def test_path_that_leads_nowhere(path):
    with pytest.raises(DataError, match="no such"):
        load(path)


def test_only_bytes_are_written(tmp_path):
    with pytest.raises(DataError, match="only uint8"):
        write_idx(tmp_path / "labels", np.zeros(3, np.int64))


@pytest.mark.parametrize(
    ("variant", "labels", "names"),
    [
        ("letters", np.arange(12) % 3 + 1, ("A", "B", "C")),
        ("balanced", np.arange(12) % 3 + 35, ("Z", "a", "b")),
        ("byclass", np.arange(12) % 3 + 59, ("x", "y", "z")),
        ("digits", np.arange(12) % 3, ("0", "1", "2")),
    ],
)
def test_emnist_is_turned_upright_and_its_classes_named(tmp_path, variant, labels, names):
    upright = np.random.default_rng(2).integers(0, 256, (12, 6, 5), np.uint8)
    for part in ("train", "test"):
        name = f"emnist-{variant}-{part}"
        write_idx(tmp_path / f"{name}-images-idx3-ubyte", np.ascontiguousarray(upright.transpose(0, 2, 1)))
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte", labels.astype(np.uint8))
    found = load(tmp_path)
    np.testing.assert_array_equal(found.train.images[:, 0], upright)
    np.testing.assert_array_equal(found.test.labels, np.arange(12) % 3)
    assert found.classes == names


def test_files_inside_folders_of_their_own_names(tmp_path, idx_folder):
    expected = load(idx_folder).train.images
    folder = tmp_path / "archive"
    for file in idx_folder.iterdir():
        (folder / file.name).mkdir(parents=True)
        (folder / file.name / file.name).write_bytes(file.read_bytes())
    np.testing.assert_array_equal(load(folder).train.images, expected)
    for file in idx_folder.iterdir():  # Kaggle's archive has them a second time, with a dot
        (folder / file.name.replace("-idx", ".idx")).write_bytes(file.read_bytes())
    np.testing.assert_array_equal(load(folder).train.images, expected)


def test_names_of_the_classes_in_a_file(idx_folder):
    (idx_folder / "classes.txt").write_text("cat\ndog\ngrößer\n", "utf-8")
    assert load(idx_folder).classes == ("cat", "dog", "größer")


def test_labels_from_one_give_no_dead_class(idx_folder, arrays):
    for name in ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"):
        write_idx(idx_folder / name, arrays[name] + 1)
    found = load(idx_folder)
    assert found.classes == ("1", "2", "3")
    np.testing.assert_array_equal(found.train.labels, arrays["train-labels-idx1-ubyte"])
