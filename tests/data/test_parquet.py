"""Parquet, as the Hub stores it: pictures as bytes, structs or lists; parts by the names of the files."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from gammabeta.data import load
from gammabeta.errors import DataError, UnavailableError

IMAGES = np.random.default_rng(6).integers(0, 256, (30, 6, 5), np.uint8)
LABELS = np.arange(30) % 3


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


BYTES = [png(image) for image in IMAGES]
STRUCTS = [{"bytes": content, "path": None} for content in BYTES]


@pytest.fixture
def write():
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def written(path, images, labels=LABELS, names=None, columns=("image", "label")):
        table = arrow.table(dict(zip(columns, (arrow.array(images), arrow.array(labels)), strict=True)))
        if names:
            notes = {"info": {"features": {columns[1]: {"names": names, "_type": "ClassLabel"}}}}
            table = table.replace_schema_metadata({b"huggingface": json.dumps(notes).encode()})
        path.parent.mkdir(exist_ok=True, parents=True)
        parquet.write_table(table, path)
        return path

    return written


@pytest.mark.parametrize("images", [BYTES, STRUCTS, IMAGES.tolist(), IMAGES[..., None].tolist()])
def test_kinds_of_columns(tmp_path, write, images):
    found = load(write(tmp_path / "digits.parquet", images, names=["zero", "one", "two"]))
    assert found.classes == ("zero", "one", "two")
    assert (len(found.train), len(found.test)) == (24, 6)
    pixels = {image.tobytes(): label for image, label in zip(IMAGES, LABELS, strict=True)}
    for split in found.splits().values():
        for image, label in zip(split.images, split.labels, strict=True):
            assert pixels.pop(image.tobytes()) == label
    assert not pixels


def test_text_labels_and_other_names_of_columns(tmp_path, write):
    words = np.array(["cat", "dog", "emu"])[LABELS].tolist()
    assert load(write(tmp_path / "a.parquet", STRUCTS, words, columns=("img", "target"))).classes[0] == "cat"


def test_a_copy_of_a_repository(tmp_path, write):
    for shard in range(2):
        rows = slice(15 * shard, 15 * shard + 15)
        write(tmp_path / "data" / f"train-0000{shard}-of-00002.parquet", STRUCTS[rows], LABELS[rows])
    write(tmp_path / "data" / "validation-00000-of-00001.parquet", STRUCTS[:9], LABELS[:9])
    write(tmp_path / "data" / "test-00000-of-00001.parquet", STRUCTS[9:], LABELS[9:])
    (tmp_path / "README.md").write_text("a card")
    found = load(tmp_path)
    assert {part: len(split) for part, split in found.splits().items()} == {
        "train": 30,
        "test": 21,
        "validation": 9,
    }
    np.testing.assert_array_equal(found.train.images[:, 0], IMAGES)
    write(tmp_path / "data" / "test-00000-of-00001.parquet", STRUCTS[9:], LABELS[9:] * 0 - 1)
    hidden = load(tmp_path)
    assert (len(hidden.test), hidden.validation) == (9, None)
    assert "labels for test are hidden" in hidden.notes[0]


def test_configurations_of_a_repository_are_not_put_together(tmp_path, write):
    for name in ("full", "small"):
        write(tmp_path / name / "train-00000-of-00001.parquet", STRUCTS)
    with pytest.raises(DataError, match="both full and small are for train; name one"):
        load(tmp_path)
    assert len(load(tmp_path / "small").train) == 24
    for part in ("train", "test"):
        write(tmp_path / "parts" / part / "0.parquet", STRUCTS)
    assert len(load(tmp_path / "parts").test) == 30


def test_pictures_are_resized_and_damaged_ones_told_at_once(tmp_path, write):
    assert load(write(tmp_path / "a.parquet", BYTES), size=(8, 9)).image_shape == (1, 8, 9)
    spoiled = [b"no picture" if row in (3, 7) else content for row, content in enumerate(BYTES)]
    path = write(tmp_path / "b.parquet", spoiled)
    with pytest.raises(DataError, match=r"2 pictures cannot be read .* row 3: .* row 7: "):
        load(path)
    found = load(path, skip_damaged=True)
    assert (len(found.train) + len(found.test), len(found.notes)) == (28, 2)


def test_files_that_cannot_be_used(tmp_path, write):
    whole = write(tmp_path / "whole.parquet", STRUCTS).read_bytes()
    cases = {
        "not an intact": lambda path: path.write_bytes(whole[:-40]),
        "not an intact Parquet file": lambda path: path.write_bytes(b"PAR1" * 9),
        "no column of images": lambda path: write(path, BYTES, columns=("x9", "label")),
        "no column of labels": lambda path: write(path, BYTES, columns=("image", "x9")),
        "different sizes": lambda path: write(path, [[1, 2], [3]] * 15),
        "store their bytes": lambda path: write(path, [{"bytes": None, "path": "a.png"}] * 30),
        "row 29: an empty file": lambda path: write(path, [*BYTES[:-1], None]),
        "1 rows have no label": lambda path: write(path, BYTES, [*LABELS.tolist()[:-1], None]),
    }
    for number, (message, spoil) in enumerate(cases.items()):
        path = tmp_path / f"{number}.parquet"
        spoil(path)
        with pytest.raises(DataError, match=message) as caught:
            load(path)
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UnavailableError, match="pip install pyarrow"):
        load(tmp_path / "a.parquet")
