"""CSV: the label first or last, with names or without; what does not fit is told with its row."""

import gzip

import numpy as np
import pytest

from gammabeta.data import load
from gammabeta.errors import DataError

IMAGES = np.random.default_rng(4).integers(0, 256, (30, 6, 6), np.uint8)
LABELS = np.arange(30) % 3
NAMES = ",".join(f"pixel{number}" for number in range(36))


def write(path, labels=LABELS, images=IMAGES, *, header="", last=False, separator=","):
    lines = [header] if header else []
    for label, image in zip(labels, images.reshape(len(images), -1).tolist(), strict=True):
        cells = [*map(str, image)]
        own = [] if label is None else [str(label)]
        lines.append(separator.join([*cells, *own] if last else [*own, *cells]))
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def whole(found):
    """All images of a data set, with the names of their classes, by content."""
    return {
        image.tobytes(): found.classes[label]
        for split in found.splits().values()
        for image, label in zip(split.images, split.labels, strict=True)
    }


EXPECTED = {image.tobytes(): str(label) for image, label in zip(IMAGES, LABELS, strict=True)}


@pytest.mark.parametrize(
    "options",
    [
        {"header": f"label,{NAMES}"},
        {},
        {"header": f"{NAMES},class", "last": True},
        {"separator": ";"},
        {"header": "\ufefflabel," + ",".join(map(str, range(36)))},
    ],
)
def test_forms_of_one_file(tmp_path, options):
    found = load(write(tmp_path / "digits.csv", **options))
    assert whole(found) == EXPECTED
    assert (len(found.train), len(found.test)) == (24, 6)
    packed = tmp_path / "digits.csv.gz"
    packed.write_bytes(gzip.compress((tmp_path / "digits.csv").read_bytes()))
    assert whole(load(packed)) == EXPECTED


def test_words_as_labels_and_labels_from_one(tmp_path):
    words = np.array(["cat", "dog", '"a, b"'])[LABELS]
    assert load(write(tmp_path / "w.csv", words)).classes == ("a, b", "cat", "dog")
    assert load(write(tmp_path / "one.csv", LABELS + 1)).classes == ("1", "2", "3")


def test_colour_and_fractions(tmp_path):
    colour = IMAGES[..., np.newaxis] // np.array([1, 2, 3], np.uint8)
    found = load(write(tmp_path / "c.csv", images=colour))
    assert found.image_shape == (3, 6, 6)
    assert whole(found).keys() == {image.transpose(2, 0, 1).tobytes() for image in colour}
    assert whole(load(write(tmp_path / "f.csv", images=IMAGES / 255))) == EXPECTED


def test_files_for_training_and_testing(tmp_path):
    folder = tmp_path / "mnist"
    write(folder / "mnist_train.csv", LABELS[:20], IMAGES[:20])
    write(folder / "mnist_test.csv", LABELS[20:], IMAGES[20:])
    found = load(folder)
    np.testing.assert_array_equal(found.test.images[:, 0], IMAGES[20:])
    np.testing.assert_array_equal(found.train.labels, LABELS[:20])


def test_a_file_inside_a_folder_of_its_own_name(tmp_path):
    folder = tmp_path / "mnist"
    for part in ("train", "test"):
        (folder / f"mnist_{part}.csv").mkdir(parents=True)
        write(folder / f"mnist_{part}.csv" / f"mnist_{part}.csv")
    assert len(load(folder).test) == 30
    assert whole(load(folder / "mnist_train.csv")) == EXPECTED


@pytest.mark.parametrize("names", [NAMES, ""])
def test_a_test_file_without_labels_is_passed_over_with_a_note(tmp_path, names):
    write(tmp_path / "k" / "train.csv", header=names and f"label,{names}")
    write(tmp_path / "k" / "test.csv", [None] * 30, header=names)
    found = load(tmp_path / "k")
    assert whole(found) == EXPECTED
    assert [note.partition(": ")[2] for note in found.notes] == ["has no labels, and is passed over"]


def test_emnist_is_turned_upright_here_too(tmp_path):
    for part in ("train", "test"):
        write(tmp_path / "e" / f"emnist-letters-{part}.csv", LABELS + 1, IMAGES.transpose(0, 2, 1))
    found = load(tmp_path / "e")
    np.testing.assert_array_equal(found.train.images[:, 0], IMAGES)
    assert found.classes == ("A", "B", "C")


def spoiled(change):
    def spoil(path):
        path.write_text(change(write(path).read_text("utf-8")), "utf-8")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_text(""), "an empty file"),
        (lambda path: path.write_text(f"label,{NAMES}\n"), "0 rows of 37 columns"),
        (lambda path: path.write_text(f"{NAMES}\n{'1,' * 35}1\n"), "no column is called label"),
        (spoiled(lambda text: text.replace(",", ",x", 1)), "could not convert .* in row 1"),
        (
            spoiled(lambda text: text.rstrip()[:-3].rpartition(",")[0]),
            "37 columns .* but 36 in row 30",
        ),
        (
            spoiled(lambda text: text.replace("\n", ",1\n").replace(",1\n", "\n", 29)),
            "but 38 in row 30",
        ),
        (spoiled(lambda text: f"label,{NAMES}\n" + text.replace(",", ",x", 1)), "could not .* in row 2"),
        (spoiled(lambda text: text.replace(",", "", 1)), "36 columns in row 1, but 37 in row 2"),
        (lambda path: write(path, images=IMAGES[:, :5]), "30 pixels in a row, which are no square"),
        (lambda path: write(path, images=IMAGES * 1000.0), "values from"),
        (lambda path: write(path, images=np.where(IMAGES > 9, np.nan, 1)), "not finite"),
        (lambda path: write(path, LABELS - 1), "a training label is -1"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, spoil, message):
    spoil(tmp_path / "bad.csv")
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / "bad.csv")
    assert "bad.csv" in str(caught.value)
    assert "\n" not in str(caught.value)
