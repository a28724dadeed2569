"""NPZ: what NumPy and Keras write is read exactly; pickles, bombs and false claims are not believed."""

import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from gammabeta.data import load
from gammabeta.errors import DataError

RANDOM = np.random.default_rng(3)
IMAGES = RANDOM.integers(0, 256, (30, 6, 5), np.uint8)
LABELS = np.arange(30) % 3


def four(**changes):
    arrays = {"x_train": IMAGES[:20], "y_train": LABELS[:20], "x_test": IMAGES[20:], "y_test": LABELS[20:]}
    return {**arrays, **changes}


def npy(header: bytes, body: bytes, version: int = 1) -> bytes:
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes((version, 0)) + length + header + body


def header(descr: str, shape: str) -> bytes:
    return f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()


def zipped(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_four_arrays(tmp_path, save):
    path = tmp_path / "digits.npz"
    save(path, **four())
    found = load(path)
    assert found.name == "digits"
    assert found.classes == ("0", "1", "2")
    np.testing.assert_array_equal(found.train.images[:, 0], IMAGES[:20])
    np.testing.assert_array_equal(found.train.labels, LABELS[:20])
    np.testing.assert_array_equal(found.test.images[:, 0], IMAGES[20:])
    np.testing.assert_array_equal(found.test.labels, LABELS[20:])


def test_channels_last_first_and_fortran_order(tmp_path):
    colour = RANDOM.integers(0, 256, (30, 3, 6, 5), np.uint8)
    for given in (colour, colour.transpose(0, 2, 3, 1), np.asfortranarray(colour)):
        np.savez(tmp_path / "c.npz", **four(x_train=given[:20], x_test=given[20:]))
        found = load(tmp_path / "c.npz")
        np.testing.assert_array_equal(found.train.images, colour[:20])
        assert found.train.images.flags.c_contiguous


@pytest.mark.parametrize("kind", ["u1", "i4", "<i8", ">i4", ">u2"])
def test_label_types_and_the_column_that_keras_writes(tmp_path, kind):
    labels = LABELS.astype(kind)[:, np.newaxis]
    np.savez(tmp_path / "l.npz", **four(y_train=labels[:20], y_test=labels[20:]))
    np.testing.assert_array_equal(load(tmp_path / "l.npz").train.labels, LABELS[:20])


def test_class_names(tmp_path):
    np.savez(tmp_path / "n.npz", **four(classes=np.array(["cat", "dog", "größer"])))
    assert load(tmp_path / "n.npz").classes == ("cat", "dog", "größer")


def test_images_and_labels_are_split_the_same_way_each_time(tmp_path):
    path = tmp_path / "whole.npz"
    np.savez(path, images=IMAGES, labels=LABELS)
    found, again = load(path), load(path)
    assert (len(found.train), len(found.test)) == (24, 6)
    assert np.bincount(found.test.labels).tolist() == [2, 2, 2]
    np.testing.assert_array_equal(found.test.images, again.test.images)
    together = np.concatenate([found.train.images, found.test.images])[:, 0]
    assert sorted(image.tobytes() for image in together) == sorted(image.tobytes() for image in IMAGES)


def test_an_image_keeps_its_side_when_others_are_added(tmp_path):
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=LABELS * 0)
    np.savez(tmp_path / "b.npz", images=IMAGES[:29], labels=LABELS[:29] * 0)
    first, second = (
        {image.tobytes() for image in load(tmp_path / name).test.images} for name in ("a.npz", "b.npz")
    )
    assert len(first & second) >= 5


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"a": IMAGES},
            "needs the keys x_train, y_train, x_test, y_test, .* or images and labels; it has 'a'",
        ),
        (four(x_train=IMAGES[:20] / 255.0), "types that do not go together"),
        (four(x_train=IMAGES[:20] - 300.0, x_test=IMAGES[20:] * 1.0), "values from -300 to "),
        (four(x_train=IMAGES[:20].astype(object)), "pickled objects are never read"),
        (four(y_train=LABELS[:19]), "19 labels for 20 images"),
        (four(y_train=LABELS[:20] - 1), "a training label is -1"),
        (four(y_test=LABELS[20:] + 5), "a test label is 7, which no training image has"),
        (four(y_train=LABELS[:20] + 0.5), "a label is 0.5, which is no whole number"),
        (four(x_train=IMAGES[:20, :, :, None, None]), "states a shape of"),
        (four(x_train=IMAGES[:20, :, :, None].repeat(2, 3)), "needed is"),
        (four(x_train=IMAGES[:20, :3]), "training images are 1×3×5, test images 1×6×5"),
        (four(x_train=IMAGES[:0], y_train=LABELS[:0]), "at least one image"),
        (four(classes=np.array(["one", "two"])), "a training label is 2, but labels go from 0 to 1"),
        ({"images": IMAGES[:4], "labels": np.array([0, 0, 1, 2])}, "class .1. has one image"),
    ],
)
def test_arrays_that_cannot_be_used(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / "bad.npz")
    assert "bad.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


BODY = IMAGES[:20].tobytes()
HEADERS = {
    "claims more": (npy(header("|u1", "(2000000000, 28, 28)"), BODY), "states a shape of"),
    "claims less": (npy(header("|u1", "(19, 6, 5)"), BODY), "states a shape of"),
    "negative": (npy(header("|u1", "(-20, 6, 5)"), BODY), "not one that NumPy writes"),
    "code": (npy(b"__import__('os').system('true')\n", BODY), "not one that NumPy writes"),
    "nested": (npy(b"(" * 4000 + b"\n", BODY), "not one that NumPy writes"),
    "long header": (npy(header("|u1", "(20, 6, 5)") + b" " * 5000, BODY, 2), "not one that NumPy writes"),
    "no magic": (b"NUMPY!" + BODY, "not a NumPy array"),
    "version": (npy(header("|u1", "(20, 6, 5)"), BODY, 9), "unknown version"),
    "cut": (npy(header("|u1", "(20, 6, 5)"), BODY)[:20], "the header need"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_are_not_believed(tmp_path, case):
    member, message = HEADERS[case]
    labels = io.BytesIO()
    np.save(labels, LABELS[:20])
    zipped(
        tmp_path / "bad.npz",
        {"x_train": member, "y_train": labels.getvalue(), "x_test": member, "y_test": labels.getvalue()},
    )
    with pytest.raises(DataError, match=message):
        load(tmp_path / "bad.npz")


def test_a_changed_byte_is_told_by_the_checksum(tmp_path):
    np.savez(tmp_path / "a.npz", **four())
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[content.index(IMAGES[:1].tobytes()) + 7] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match="Bad CRC-32"):
        load(tmp_path / "a.npz")


def test_bomb_is_refused_before_memory_is_taken(tmp_path):
    path = tmp_path / "bomb.npz"
    member = npy(header("|u1", "(150, 1000, 1000)"), bytes(150_000_000))
    zipped(path, {"x_train": member}, zipfile.ZIP_DEFLATED)
    for key in ("y_train", "x_test", "y_test"):
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(f"{key}.npy", member[:200])
    del member
    tracemalloc.start()
    with pytest.raises(DataError, match="unpacks to more than a file of its size plausibly holds"):
        load(path)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"nonsense" * 100])
def test_no_zip(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match="not an intact NPZ file"):
        load(tmp_path / "a.npz")


def whole(images, labels, tmp_path, **more):
    """Images with their classes' names, of a data set with these arrays."""
    np.savez(tmp_path / "whole.npz", images=images, labels=labels, **more)
    found = load(tmp_path / "whole.npz")
    return found, {
        image.tobytes(): found.classes[label]
        for split in found.splits().values()
        for image, label in zip(split.images, split.labels, strict=True)
    }


EXPECTED = {image.tobytes(): str(label) for image, label in zip(IMAGES, LABELS, strict=True)}


@pytest.mark.parametrize(
    "images",
    [
        IMAGES / 255,
        (IMAGES / 255).astype(np.float32),
        IMAGES / 127.5 - 1,
        IMAGES.astype(np.float64),
        IMAGES.astype(">i4"),
        IMAGES.astype(np.int64)[..., None],
    ],
)
def test_images_of_other_types_are_the_same_pixels(tmp_path, images):
    assert whole(images, LABELS, tmp_path)[1] == EXPECTED


def test_deep_images_are_scaled_alike_in_every_part(tmp_path):
    deep = IMAGES.astype(np.uint16) * 16  # 12 bits
    dark = deep // 40
    np.savez(tmp_path / "d.npz", **four(x_train=deep[:20], x_test=dark[20:]))
    found = load(tmp_path / "d.npz")
    np.testing.assert_allclose(found.train.images[:, 0], IMAGES[:20], atol=1)
    np.testing.assert_allclose(found.test.images[:, 0], IMAGES[20:] / 40, atol=1)
    assert "read as 12 bits" in found.notes[0]


def test_black_and_white_and_flat_images(tmp_path):
    found, _ = whole(IMAGES > 99, LABELS, tmp_path)
    assert set(np.unique(found.train.images)) == {0, 255}
    square = IMAGES[:, :5]
    assert whole(square.reshape(30, 25), LABELS, tmp_path)[0].image_shape == (1, 5, 5)


def test_images_on_an_unknown_scale_are_told(tmp_path):
    found, _ = whole(IMAGES // 16, LABELS, tmp_path)
    assert found.notes == ()  # bytes are what they are
    found, _ = whole(IMAGES / 16.0, LABELS, tmp_path)
    assert "brightest value is" in found.notes[0]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (np.eye(3)[LABELS], ("0", "1", "2")),
        (np.eye(3, dtype=bool)[LABELS], ("0", "1", "2")),
        (LABELS.astype(np.float32), ("0", "1", "2")),
        (LABELS + 1, ("1", "2", "3")),
        (LABELS * 5, ("0", "5", "10")),
        (np.array(["cat", "dog", "ä"])[LABELS], ("cat", "dog", "ä")),
    ],
)
def test_every_class_has_images_whatever_the_labels_are(tmp_path, labels, names):
    found, images = whole(IMAGES, labels, tmp_path)
    assert found.classes == names
    assert found.missing("train") == []
    assert images == {image.tobytes(): names[label] for image, label in zip(IMAGES, LABELS, strict=True)}


def test_labels_from_one_with_names(tmp_path):
    names = np.array(["a", "b", "c"])
    _, images = whole(IMAGES, LABELS + 1, tmp_path, classes=names)
    assert images == {image.tobytes(): names[label] for image, label in zip(IMAGES, LABELS, strict=True)}


def test_keys_of_medmnist(tmp_path):
    columns = LABELS.astype(np.uint8)[:, None]
    parts = {"train": slice(20), "val": slice(20, 24), "test": slice(24, 30)}
    arrays = {f"{part}_images": IMAGES[rows] for part, rows in parts.items()}
    arrays |= {f"{part}_labels": columns[rows] for part, rows in parts.items()}
    np.savez(tmp_path / "m.npz", **arrays)
    found = load(tmp_path / "m.npz")
    np.testing.assert_array_equal(found.test.images[:, 0], IMAGES[24:])
    assert found.validation is not None
    np.testing.assert_array_equal(found.validation.labels, LABELS[20:24])
    arrays["train_labels"] = np.ones((20, 14), np.uint8)
    np.savez(tmp_path / "chest.npz", **arrays)
    with pytest.raises(DataError, match="not one-hot; give one class an image"):
        load(tmp_path / "chest.npz")


def test_values_that_are_no_pixels_are_refused(tmp_path):
    for images, message in (
        (np.where(IMAGES > 200, np.nan, 1.0), "not finite"),
        ((IMAGES - 128.0) / 70, "values from -1.8"),
        (IMAGES.astype(np.int64) * 1000, "values from 0 to 2"),
    ):
        with pytest.raises(DataError, match=message):
            whole(images, LABELS, tmp_path)
