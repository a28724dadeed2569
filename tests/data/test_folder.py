"""Folders of pictures: classes by name, sizes and colours by rule, nothing left out in silence."""

import io
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gammabeta.data import load
from gammabeta.data.dataset import hold_out_training
from gammabeta.data.decode import decode, is_grey, open_picture
from gammabeta.errors import DataError, UnavailableError

RANDOM = np.random.default_rng(5)


def picture(path: Path, *shape: int, **options) -> np.ndarray:
    pixels = RANDOM.integers(0, 256, shape, np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


@pytest.fixture
def pets(tmp_path):
    """Two classes of ten grey pictures of 8 rows and 6 columns."""
    for name in ("cat", "dog"):
        for number in range(10):
            picture(tmp_path / "pets" / name / f"{number}.png", 8, 6)
    return tmp_path / "pets"


def test_classes_are_folders_and_a_fifth_is_held_out(pets):
    found = load(pets)
    assert found.name == "pets"
    assert found.classes == ("cat", "dog")
    assert found.image_shape == (1, 8, 6)
    assert np.bincount(found.train.labels).tolist() == [8, 8]
    assert np.bincount(found.test.labels).tolist() == [2, 2]
    expected = {
        np.asarray(Image.open(path)).tobytes(): found.classes.index(path.parent.name)
        for path in pets.rglob("*.png")
    }
    for split in (found.train, found.test):
        for image, label in zip(split.images, split.labels, strict=True):
            assert expected.pop(image.tobytes()) == label
    assert not expected


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_train_and_test_folders(tmp_path, test_name):
    wanted = [picture(tmp_path / "train" / name / "1.png", 4, 4) for name in "ab"]
    held = picture(tmp_path / test_name / "b" / "1.png", 4, 4)
    picture(tmp_path / test_name / "a" / "1.png", 4, 4)
    found = load(tmp_path)
    np.testing.assert_array_equal(found.train.images[:, 0], wanted)
    np.testing.assert_array_equal(found.test.images[1, 0], held)


def test_one_colour_picture_makes_all_colour(pets):
    picture(pets / "dog" / "x.png", 8, 6, 3)
    assert load(pets).image_shape == (3, 8, 6)


def test_grey_palettes_are_grey(pets):
    grey = Image.fromarray(RANDOM.integers(0, 256, (8, 6), np.uint8)).convert("P")
    grey.save(pets / "dog" / "x.gif")
    assert load(pets).image_shape == (1, 8, 6)


def test_formats_are_mixed_freely(pets):
    for suffix in ("bmp", "jpg", "webp", "tif", "pgm", "gif"):
        picture(pets / "cat" / f"other.{suffix}", 8, 6)
    found = load(pets)
    assert len(found.train) + len(found.test) == 26


@pytest.mark.parametrize(
    ("sizes", "decided", "fit"),
    [
        ([(8, 6), (8, 6)], (8, 6), "crop"),  # small and alike: as they are
        ([(96, 96), (96, 96)], (96, 96), "crop"),
        ([(300, 200), (300, 200)], (64, 40), "stretch"),  # 2:3 is not 5:8
        ([(512, 512), (512, 512)], (64, 64), "crop"),
        ([(8, 6), (10, 12)], (32, 32), "stretch"),
        ([(40, 60), (44, 48), (60, 54)], (48, 56), "stretch"),
        ([(2000, 100), (100, 2000)], (64, 64), "stretch"),
    ],
)
def test_a_size_is_decided_from_the_pictures_and_told(tmp_path, sizes, decided, fit):
    for number, size in enumerate(sizes * 5):
        for name in "ab":
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(RANDOM.integers(0, 256, (*size, 3), np.uint8)).save(
                tmp_path / name / f"{number}.png"
            )
    found = load(tmp_path)
    assert found.image_shape[1:] == decided
    assert found.preparation.fit == fit
    same = decided == sizes[0]
    assert found.notes == () if same else f"resized to {decided[0]}×{decided[1]}" in found.notes[0]
    assert load(tmp_path, size=(5, 7)).image_shape == (3, 5, 7)
    again = load(tmp_path, preparation=found.preparation)
    np.testing.assert_array_equal(again.test.images, found.test.images)


def test_resizing_keeps_proportions_and_crops_about_the_centre(tmp_path):
    # White in the middle third of a wide picture: all white once cropped to a square about the centre.
    pixels = np.zeros((20, 60), np.uint8)
    pixels[:, 20:40] = 255
    for name in ("a/1.png", "a/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / name)
    assert load(tmp_path, size=(10, 10)).train.images.mean() > 240


def test_exif_orientation_is_obeyed(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    for number in range(2):
        path = tmp_path / "a" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path, exif=exif)
    found = load(tmp_path)
    assert found.image_shape == (3, 6, 4)
    np.testing.assert_array_equal(found.train.images[0, :, :, 3], 255)


def test_hidden_files_are_passed_over(pets):
    (pets / ".DS_Store").write_bytes(b"x")
    (pets / "cat" / ".hidden.png").write_bytes(b"x")
    (pets / "cat" / "Thumbs.db").write_bytes(b"x")
    assert len(load(pets).classes) == 2


def spoil_loose(root):
    picture(root / "lost.png", 8, 6)


def spoil_text(root):
    (root / "cat" / "notes.txt").write_text("two cats")


def spoil_content(root):
    (root / "cat" / "1.png").write_text("not a picture")


def spoil_cut(root):
    path = root / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:-30])


def spoil_empty(root):
    (root / "newt").mkdir()


def spoil_single(root):
    picture(root / "newt" / "1.png", 8, 6)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_loose, r"lost\.png: a file beside the class folders"),
        (spoil_text, r"notes\.txt: not a picture"),
        (spoil_content, r"1\.png: not a picture in a format read here"),
        (spoil_cut, r"1\.png: damaged picture"),
        (spoil_empty, "newt: no pictures"),
        (spoil_single, "class .newt. has one image"),
    ],
)
def test_folder_that_cannot_be_used(pets, spoil, message):
    spoil(pets)
    with pytest.raises(DataError, match=message) as caught:
        load(pets)
    assert "\n" not in str(caught.value)


def test_class_only_in_test(tmp_path):
    picture(tmp_path / "train" / "a" / "1.png", 4, 4)
    picture(tmp_path / "test" / "z" / "1.png", 4, 4)
    with pytest.raises(DataError, match=r"'z' cannot be matched by name .* which has 'a'; the data have 'z'"):
        load(tmp_path)


def test_train_without_test(tmp_path):
    picture(tmp_path / "train" / "a" / "1.png", 4, 4)
    with pytest.raises(DataError, match="but no folder test"):
        load(tmp_path)


def test_pictures_that_do_not_fit_into_memory(pets):
    with pytest.raises(DataError, match="state a size between"):
        load(pets, size=(5000, 5000))


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: p.write_text("hello")])
def test_path_without_data(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(DataError, match="no data set found here"):
        load(tmp_path / "x")


def test_only_pictures_are_resized(idx_folder):
    with pytest.raises(DataError, match="only pictures in folders are resized"):
        load(idx_folder, size=(3, 3))


def test_classes_called_train_and_test_are_classes(tmp_path):
    for name in ("plane", "train", "test"):
        for number in range(5):
            picture(tmp_path / name / f"{number}.png", 4, 4)
    assert load(tmp_path).classes == ("plane", "test", "train")


def test_validation_and_test_folders_are_kept_apart(tmp_path):
    for part, many in (("Train", 5), ("val", 3), ("TEST", 2)):
        for name in "ab":
            for number in range(many):
                picture(tmp_path / part / name / f"{number}.png", 4, 4)
    found = load(tmp_path)
    assert {part: len(split) for part, split in found.splits().items()} == {
        "train": 10,
        "test": 4,
        "validation": 6,
    }
    picture(tmp_path / "valid" / "a" / "1.png", 4, 4)
    with pytest.raises(DataError, match="val and valid are both for validation"):
        load(tmp_path)


def test_classes_of_the_test_folder_are_matched_by_name(tmp_path):
    names = ("Fuß", "Äpfel")
    for number in range(2):
        for name in names:
            picture(tmp_path / "train" / unicodedata.normalize("NFC", name) / f"{number}.png", 4, 4)
    wanted = picture(tmp_path / "test" / unicodedata.normalize("NFD", names[1]).lower() / "1.png", 4, 4)
    found = load(tmp_path)
    np.testing.assert_array_equal(found.test.images[0, 0], wanted)
    assert found.classes[found.test.labels[0]] == names[1]
    assert found.missing("test") == [names[0]]
    assert "case differ" in found.notes[0]


def test_all_damaged_pictures_are_told_at_once_or_passed_over(pets):
    spoil_cut(pets)
    spoil_text(pets)
    (pets / "dog" / "5.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"3 pictures cannot be read \(--skip-damaged") as caught:
        load(pets)
    assert "\n" not in str(caught.value)
    found = load(pets, skip_damaged=True)
    assert len(found.train) + len(found.test) == 18
    for name in ("cat/1.png", "dog/5.png", "cat/notes.txt"):
        assert name in str(caught.value)
        assert any(name in note for note in found.notes)


def test_a_class_without_a_picture_that_can_be_read(pets):
    for number in range(10):
        (pets / "dog" / f"{number}.png").write_bytes(b"")
    with pytest.raises(DataError, match="no picture of class 'dog' could be read"):
        load(pets, skip_damaged=True)


def test_jfif_and_heic(pets):
    picture(pets / "cat" / "a.jpg", 8, 6).tobytes()
    (pets / "cat" / "a.jpg").rename(pets / "cat" / "a.JFIF")
    assert len(load(pets).train.labels) == 17
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.fromarray(RANDOM.integers(0, 256, (8, 6), np.uint8)).convert("RGB")).save(
        pets / "cat" / "b.heic"
    )
    assert load(pets).image_shape == (3, 8, 6)


def test_heic_without_its_plugin(pets, monkeypatch):
    monkeypatch.setattr("gammabeta.data.decode.find_spec", lambda _: None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    (pets / "cat" / "b.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(UnavailableError, match="pip install pillow-heif"):
        load(pets, skip_damaged=True)  # it is not the picture that is damaged


def test_damaged_deep_pictures_are_passed_over_and_the_rest_is_prepared_alike(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for number in range(5):
            samples = np.full((8, 8), 4095, np.uint16)
            samples[: number + 1] = 100
            Image.fromarray(samples).save(tmp_path / label / f"{number}.png")
    whole = load(tmp_path)
    damaged = tmp_path / "a" / "torn.png"
    content = (tmp_path / "a" / "0.png").read_bytes()
    damaged.write_bytes(content[:60])
    found = load(tmp_path, skip_damaged=True)
    assert found.preparation == whole.preparation
    assert found.preparation is not None
    assert found.preparation.full == 4095
    assert len(found.notes) == 1
    assert str(damaged) in found.notes[0]
    again = load(tmp_path, skip_damaged=True, preparation=found.preparation)
    assert np.array_equal(again.train.images, found.train.images)
    with pytest.raises(DataError, match=r"torn\.png: .*--skip-damaged"):
        load(tmp_path, preparation=found.preparation)


def test_a_flat_picture_is_named(pets):
    Image.new("L", (6, 8), 9).save(pets / "cat" / "a.png")
    (told,) = [remark for remark in load(pets).remarks() if "flat colour" in remark]
    assert told.startswith("1 of ")
    assert f"the first: {pets / 'cat' / 'a.png'})" in told
    assert hold_out_training(load(pets), 4, 0).train.names


@pytest.mark.parametrize("orientation", range(1, 9))
def test_heic_is_turned_upright_once(tmp_path: Path, orientation: int) -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[:30, :30] = 250
    exif = Image.Exif()
    exif[0x0112] = orientation
    for suffix in ("heic", "png"):
        Image.fromarray(pixels).save(tmp_path / f"x.{suffix}", exif=exif.tobytes(), quality=95)
    found, wanted = (decode(tmp_path / f"x.{suffix}", "L") for suffix in ("heic", "png"))
    assert found.size == wanted.size
    assert np.abs(np.int32(found) - np.int32(wanted)).mean() < 3


@pytest.mark.parametrize("kind", ["grey", "ten bits", "transparent", "two pictures"])
def test_heic_of_every_kind(tmp_path: Path, kind: str) -> None:
    heif = pytest.importorskip("pillow_heif")
    pixels = np.full((64, 64, 3), 200, np.uint8)
    pixels[:32] = 40
    picture = Image.fromarray(pixels)
    if kind == "grey":
        made = heif.from_pillow(picture.convert("L"))
    elif kind == "ten bits":
        made = heif.from_bytes("RGB;16", (64, 64), (pixels.astype(np.uint16) << 8).tobytes())
    elif kind == "transparent":
        picture.putalpha(Image.fromarray(np.uint8(255 * (pixels[..., 0] < 99))))
        made = heif.from_pillow(picture)
    else:
        made = heif.from_pillow(picture)
        made.add_from_pillow(Image.new("RGB", (64, 64), (255, 0, 0)))
    made.save(tmp_path / "x.HEIC", quality=95)
    with open_picture(tmp_path / "x.HEIC") as opened:
        assert is_grey(opened) == (kind == "grey")
    found = np.asarray(decode(tmp_path / "x.HEIC", "RGB"))
    assert abs(int(found[8, 8, 0]) - 40) < 4
    assert abs(int(found[56, 56, 0]) - (255 if kind == "transparent" else 200)) < 4


def test_heic_without_a_name(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 10, 10)).save(buffer, "HEIF")
    Image.OPEN.pop("HEIF")
    Image.ID.remove("HEIF")
    assert decode(buffer, "RGB").size == (64, 64)
