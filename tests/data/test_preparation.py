"""What is learned of training pictures: their style of ink, their looks, the range of their samples."""

import numpy as np
import pytest
from PIL import Image

from gammabeta.data import Preparation, Split, load
from gammabeta.data.dataset import Dataset
from gammabeta.data.likeness import Likeness
from gammabeta.data.preparation import BlankError, earlier, earlier_training
from gammabeta.errors import DataError


@pytest.fixture(scope="module")
def digits(mnist):
    return mnist.train.images[:300]


def placed(digits, side, random):
    """Digits anywhere on a larger page: nothing that they have in common could be learned."""
    pages = np.zeros((len(digits), 1, side, side), np.uint8)
    for page, digit in zip(pages, digits, strict=True):
        y, x = random.integers(0, side - 28, 2)
        page[0, y : y + 28, x : x + 28] = digit[0]
    return pages


def garments(count, random):
    """Light shapes on black that fill the height, as Fashion-MNIST has them."""
    pages = np.zeros((count, 1, 28, 28), np.uint8)
    for page in pages:
        half = random.integers(4, 12)
        page[0, :, 14 - half : 14 + half] = random.integers(120, 256, (28, 2 * half))
        page[0, 5, 14] = 255
    return pages


def test_the_style_is_learned_from_the_pictures_not_their_name(digits):
    random = np.random.default_rng(0)
    learned = Preparation(1, 28, 28).learned(digits)
    assert (learned.style, learned.ink, learned.box) == ("digit", "light", 20 / 28)
    dark = Preparation(1, 28, 28).learned(255 - digits)
    assert (dark.style, dark.ink) == ("digit", "dark")
    assert Preparation(3, 28, 28).learned(np.repeat(digits, 3, 1)).style == "digit"
    wider = Preparation(1, 32, 32).learned(np.pad(digits, ((0, 0), (0, 0), (2, 2), (2, 2))))
    assert (wider.style, wider.box) == ("digit", 20 / 32)
    assert Preparation(1, 28, 28).learned(garments(200, random)).style == "object"


def test_pictures_without_a_common_style_are_taken_as_they_are(digits):
    random = np.random.default_rng(0)
    pages = placed(digits, 48, random)
    dim = digits // 2  # how light the ink is may be what tells the classes apart
    noise = random.integers(0, 256, (200, 1, 28, 28), np.uint8)
    tinted = np.concatenate([digits, 0 * digits, digits], 1)
    for images in (pages, dim, noise, tinted, np.zeros((9, 1, 28, 28), np.uint8), noise[:, :, :2, :2]):
        assert Preparation(images.shape[1], *images.shape[2:]).learned(images).style == "plain"


def save(pixels, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("kind", ["npz", "idx", "folder", "folder, dark ink", "folder in colour"])
def test_paper_is_brought_to_one_s_own_digits(mnist, tmp_path, kind):
    """A photograph of paper becomes what the network learned, whatever the data set is called."""
    images, labels = mnist.train.images[:200], mnist.train.labels[:200]
    if kind == "npz":
        np.savez(tmp_path / "own.npz", images=images[:, 0], labels=labels)
        found = load(tmp_path / "own.npz")
    elif kind == "idx":
        from gammabeta.data import write_idx

        for part in ("train", "t10k"):
            write_idx(tmp_path / f"{part}-images-idx3-ubyte", images[:, 0])
            write_idx(tmp_path / f"{part}-labels-idx1-ubyte", labels.astype(np.uint8))
        found = load(tmp_path)
    else:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            pixels = 255 - image[0] if "dark" in kind else image[0]
            pixels = np.repeat(pixels[..., None], 3, 2) if "colour" in kind else pixels
            save(pixels, tmp_path / "own" / str(label) / f"{number}.png")
        found = load(tmp_path / "own")
    preparation = found.settled().preparation
    assert preparation is not None
    assert preparation.style == "digit"
    digit = mnist.test.images[3, 0]
    paper = Image.fromarray(255 - digit).resize((336, 336), Image.Resampling.BICUBIC)
    page = Image.new("L", (700, 500), 255)
    page.paste(paper, (300, 20))
    page.save(tmp_path / "paper.png")
    picture = preparation.prepare(tmp_path / "paper.png")
    wanted = 255 - digit if preparation.ink == "dark" else digit
    assert np.abs(picture[0].astype(int) - wanted).mean() < 12
    own = save(wanted, tmp_path / "own.png")
    np.testing.assert_array_equal(preparation.prepare(own)[0], wanted)


def test_training_prepares_the_exceptions_too(mnist, tmp_path):
    """A few photographs of paper among a folder of digits: trained on as they are predicted."""
    for number, (image, label) in enumerate(
        zip(mnist.train.images[:100], mnist.train.labels[:100], strict=True)
    ):
        save(image[0], tmp_path / str(label) / f"{number}.png")
    paper = np.kron(255 - mnist.train.images[0, 0], np.ones((9, 9), np.uint8))
    save(np.pad(paper, ((0, 0), (0, 200)), constant_values=255), tmp_path / "5" / "paper.png")
    save(np.zeros((28, 28), np.uint8), tmp_path / "5" / "blank.png")
    found = load(tmp_path, size=(28, 28))
    assert found.preparation is not None
    assert found.preparation.style == "digit"
    again = load(tmp_path, preparation=found.preparation)
    for first, second in ((found.train, again.train), (found.test, again.test)):
        np.testing.assert_array_equal(first.images, second.images)
    pictures = np.concatenate([found.train.images, found.test.images])
    prepared = found.preparation.prepare(tmp_path / "5" / "paper.png")
    assert (pictures == prepared).all((1, 2, 3)).any()
    with pytest.raises(BlankError):
        found.preparation.prepare(tmp_path / "5" / "blank.png")


def strange(random):
    y, x = np.mgrid[-1:1:28j, -1:1:28j]
    return {
        "noise": random.integers(0, 256, (28, 28)),
        "inverted": 255 - 255 * (np.hypot(x, y) < 0.3),
        "gradient": 127 * (x + 1),
        "haze": 255 * np.exp(-3 * (x * x + y * y)),
        "checks": 255 * (((y * 8).astype(int) + (x * 8).astype(int)) % 2),
    }


def test_how_far_a_picture_lies_from_the_training_s(mnist):
    like = Preparation(1, 28, 28).knowing(mnist.train.images[:2000]).like
    assert like is not None
    assert (like.distance(mnist.test.images) > like.limit).mean() < 0.002
    for name, pixels in strange(np.random.default_rng(0)).items():
        picture = pixels.astype(np.uint8)[np.newaxis]
        distance = float(like.distance(picture[np.newaxis])[0])
        assert distance > like.limit, name
        assert "unlike the training pictures" in (like.complaint(picture, distance) or "")
    assert like.complaint(mnist.test.images[0], 0.5) is None


def test_a_strange_picture_is_answered_without_confidence(mnist):
    like = Preparation(1, 28, 28).knowing(mnist.train.images[:2000]).like
    assert like is not None
    sure = np.zeros((3, 10), np.float32)
    sure[:, 7] = 1
    tempered = like.tempered(sure, np.array([0.5, like.limit * 1.001, like.limit * 4]))
    np.testing.assert_array_equal(tempered[0], sure[0])
    assert tempered[1, 7] > 0.99
    assert 0.1 < tempered[2, 7] < 0.2
    assert (tempered.argmax(1) == 7).all()
    np.testing.assert_allclose(tempered.sum(1), 1, rtol=1e-6)


def test_few_pictures_tell_nothing_of_their_kind(digits):
    assert Preparation(1, 28, 28).knowing(digits[:19]).like is None


@pytest.mark.parametrize("top", [200, 1000, 4095, 16383, 65535])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_samples_of_sixteen_bits_are_scaled_alike_over_a_data_set(tmp_path, top, suffix):
    """The full scale is that of the data set: a file that stays dark is dark, and none is black."""
    ramp = np.linspace(0, 1, 64, dtype=np.float64).reshape(8, 8)
    for name, share in (("a/bright", 1.0), ("a/dark", 0.25), ("b/bright", 1.0), ("b/dark", 0.25)):
        save((ramp * top * share).astype(np.uint16), tmp_path / f"{name}.{suffix}")
    found = load(tmp_path)
    images = np.concatenate([found.train.images, found.test.images])
    peaks = sorted(image.max() for image in images)
    full = max(255, 2 ** int(top).bit_length() - 1)
    assert found.preparation is not None
    assert found.preparation.full == full
    assert peaks == pytest.approx([255 * top / full / 4] * 2 + [255 * top / full] * 2, abs=2)
    assert len(np.unique(images)) > 40
    dark = found.preparation.prepare(tmp_path / "a" / f"dark.{suffix}")
    assert (images == dark).all((1, 2, 3)).any()
    alone = Preparation(1, 8, 8).prepare(tmp_path / "a" / f"bright.{suffix}")
    assert alone.max() == pytest.approx(255 * top / full, abs=2)


def test_what_a_tiff_says_of_its_range_is_believed(tmp_path):
    samples = np.full((8, 8), 1500, np.uint16)
    samples[0, 0] = 0
    Image.fromarray(samples).save(tmp_path / "x.tif", tiffinfo={281: 2999})
    assert Preparation(1, 8, 8).prepare(tmp_path / "x.tif").max() == 128


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (np.array([[0, 257, 4095, 65535]], np.uint16), [0, 1, 15, 255]),
        (np.array([[0, 7, 255]], np.int32), [0, 7, 255]),
        (np.array([[0, 300]], np.int32), [0, 1]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 127, 255]),
        (np.array([[0, 99, 1000]], np.float32), [0, 99, 255]),
    ],
)
def test_a_run_of_an_earlier_version_reads_samples_as_it_did(tmp_path, samples, expected):
    save(samples, tmp_path / "x.tif")
    for earlier_one in (earlier(1, samples.shape, "plain"), earlier_training(1, samples.shape)):
        assert earlier_one.prepare(tmp_path / "x.tif").ravel().tolist() == expected


def test_floating_point_is_scaled_alike_over_a_data_set(tmp_path):
    for name, share in (("a/1", 1.0), ("a/2", 0.5), ("b/1", 1000.0), ("b/2", 0.5)):
        save(np.float32([[0, share]]).repeat(4, 0).repeat(4, 1), tmp_path / f"{name}.tif")
    found = load(tmp_path)
    assert found.preparation is not None
    assert found.preparation.full == 1023


def test_colours_of_sixteen_bits_that_would_be_black_are_refused(tmp_path):
    """Pillow reads only their upper byte; nothing would be left of 12-bit data but 16 shades."""
    import struct
    import zlib

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    for top, fine in ((4095, False), (65535, True)):
        rows = b"".join(b"\0" + struct.pack(">24H", *[top] * 24) for _ in range(8))
        head = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
        content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows))
        (tmp_path / "x.png").write_bytes(content + chunk(b"IEND", b""))
        if fine:
            assert Preparation(3, 8, 8).prepare(tmp_path / "x.png").max() == 255
        else:
            with pytest.raises(DataError, match="colours of 16 bits that fill only the lower 12"):
                Preparation(3, 8, 8).prepare(tmp_path / "x.png")


def test_flat_pictures_are_noticed(digits):
    images = digits[:6].copy()
    images[2] = 9
    labels = np.array([0, 0, 1, 1, 0, 1])
    found = Dataset("x", Split(images, labels), Split(digits[:2], labels[1:3]), ("cat", "dog")).settled()
    style, flat = found.remarks()
    assert style.startswith("pictures: light ink on dark, 71% of the frame")
    assert flat.startswith("1 of 6 training images are one flat colour (the first: number 2, of class 'dog')")


@pytest.mark.parametrize("highest", [1, 100, 127, 255, 3000])
def test_any_range_that_a_file_states(tmp_path, highest):
    samples = np.full((8, 8), highest, np.uint16)
    samples[0] = 0
    Image.fromarray(samples).save(tmp_path / "x.tif", tiffinfo={281: highest})
    assert np.unique(Preparation(1, 8, 8).prepare(tmp_path / "x.tif")).tolist() == [0, 255]


@pytest.mark.parametrize(
    ("mean", "row", "limit"),
    [((0.0,) * 4, (0.0,) * 4, 1.0), ((0.0,) * 5, (0.0,) * 4, 1.0), ((0.0,) * 5, (0.0,) * 5, 0.0),
     ((float("inf"),) * 5, (0.0,) * 5, 1.0), ((0.0,) * 5, (float("nan"),) * 5, 1.0),
     ((0.0,) * 5, (1e300,) * 5, 1.0)],
)  # fmt: skip
def test_statistics_that_cannot_be(mean, row, limit):
    with pytest.raises(DataError, match="damaged"):
        Likeness(mean, (row,) * len(mean), limit)


@pytest.mark.parametrize(
    "changed",
    [
        {"channels": 2}, {"height": 0}, {"style": "x"}, {"fit": "x"}, {"ink": "x"}, {"box": 0.0},
        {"box": float("nan")}, {"full": -1.0}, {"full": float("nan")}, {"full": 1e-300},
        {"like": Likeness((0.0,) * 8, ((0.0,) * 8,) * 8, 1.0)},
    ],
)  # fmt: skip
def test_a_preparation_that_cannot_be(changed):
    with pytest.raises(DataError):
        Preparation(**{"channels": 1, "height": 9, "width": 9, **changed})
