"""Pictures as people make them come out as the digits of MNIST that they show.

The judge: of the 10,000 test digits, is the one nearest to the prepared picture (by squared distance) the
digit that the picture was made from? Only nearly the same pixels at the very same place pass that. Failing
that, is it at least a digit of the same class?
"""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gammabeta.data import load_picture
from gammabeta.data.picture import find_ink
from gammabeta.errors import DataError

COUNT = 30
SIZE = (28, 28)


def large(digit: np.ndarray, factor: int = 12) -> np.ndarray:
    side = 28 * factor
    return np.asarray(Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC), np.float32)


def saved(pixels: np.ndarray, path: Path, **options) -> Path:
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, **options)
    return path


def as_it_is(digit, path, _):
    return saved(digit, path)


def inverted(digit, path, _):
    return saved(255.0 - digit, path)


def dark_on_white(digit, path, _):
    return saved(255 - large(digit), path)


def off_centre(digit, path, random):
    room = random.integers(20, 600, 4)
    return saved(np.pad(255 - large(digit), room.reshape(2, 2), constant_values=255), path)


def pencil(digit, path, _):
    return saved(200 - 0.3 * large(digit), path)


def blue_on_yellow(digit, path, _):
    ink = large(digit)[..., np.newaxis]
    return saved(np.array([240, 220, 60]) - ink * np.array([0.8, 0.7, -0.5]), path)


def photograph(digit, path, random):
    """Paper lit from one side, darker in the corners, noisy, and saved as a poor JPEG."""
    ink = large(digit)
    y, x = np.mgrid[-1 : 1 : len(ink) * 1j, -1 : 1 : len(ink) * 1j]
    paper = 190 + 40 * x - 25 * y - 20 * (x * x + y * y)
    noisy = paper * (1 - 0.7 * ink / 255) + random.normal(0, 6, ink.shape)
    return saved(noisy, path.with_suffix(".jpg"), quality=60)


def specks(digit, path, random):
    page = 255 - large(digit)
    for y, x in random.integers(0, len(page) - 3, (15, 2)):
        page[y : y + 3, x : x + 3] = 60
    return saved(page, path)


def transparent(shade):
    def make(digit, path, _):
        pixels = np.full((*large(digit).shape, 4), shade, np.uint8)
        pixels[..., 3] = np.clip(large(digit), 0, 255)
        Image.fromarray(pixels).save(path)
        return path

    return make


def tight(digit, path, _):
    page = 255 - large(digit)
    inked = page < 195
    return saved(page[np.ix_(inked.any(axis=1), inked.any(axis=0))], path)


def turned(digit, path, _):
    """Stored lying on its side, with the EXIF note that telephones leave."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(np.rot90(255 - large(digit)), path.with_suffix(".jpg"), exif=exif, quality=90)


def sixteen_bits(digit, path, _):
    Image.fromarray((65535 - 257 * np.clip(large(digit), 0, 255)).astype(np.uint16)).save(path)
    return path


def in_format(suffix):
    def make(digit, path, _):
        return saved(255 - large(digit, 8), path.with_suffix(suffix))

    return make


def palette(digit, path, _):
    Image.fromarray(255 - digit).convert("P").save(path.with_suffix(".gif"))
    return path.with_suffix(".gif")


def cmyk(digit, path, _):
    page = Image.fromarray(np.clip(255 - large(digit), 0, 255).astype(np.uint8))
    page.convert("CMYK").save(path.with_suffix(".jpg"), quality=90)
    return path.with_suffix(".jpg")


#: How the picture is made, and what share of the digits must be found again. Less than all where noise, or
#: the crop of a blurred digit, moves an edge by a pixel; the digit found instead is then nearly always of
#: the same class.
CASES = {
    "as it is": (as_it_is, 1.0),
    "inverted": (inverted, 1.0),
    "dark on white": (dark_on_white, 0.9),
    "off-centre": (off_centre, 0.9),
    "pencil": (pencil, 0.9),
    "blue on yellow": (blue_on_yellow, 0.9),
    "photograph": (photograph, 0.5),
    "specks": (specks, 0.9),
    "transparent, black ink": (transparent(0), 0.9),
    "transparent, white ink": (transparent(255), 0.9),
    "tight": (tight, 0.8),
    "turned": (turned, 0.9),
    "16 bits": (sixteen_bits, 0.9),
    "palette": (palette, 1.0),
    "CMYK": (cmyk, 0.9),
    **{suffix: (in_format(suffix), 0.9) for suffix in (".bmp", ".jpg", ".webp", ".tif", ".pgm")},
}


@pytest.fixture(scope="module")
def digits(mnist):
    """Some test digits; a function from a picture to the nearest one's number; all labels."""
    rows = mnist.test.images.reshape(10_000, -1).astype(np.float32)
    norms = np.square(rows).sum(axis=1)

    def nearest(picture: np.ndarray) -> int:
        return int(np.argmin(norms - 2 * rows @ picture.reshape(-1).astype(np.float32)))

    chosen = np.random.default_rng(1).choice(10_000, COUNT, replace=False)
    return [(int(number), mnist.test.images[number, 0]) for number in chosen], nearest, mnist.test.labels


@pytest.mark.parametrize("case", CASES)
def test_digit_is_found_again(case, digits, tmp_path):
    make, share = CASES[case]
    chosen, nearest, labels = digits
    random = np.random.default_rng(2)
    found = alike = 0
    for number, digit in chosen:
        path = make(digit, tmp_path / "digit.png", random)
        picture = load_picture(path, channels=1, size=SIZE)
        assert picture.shape == (1, 28, 28)
        assert picture.dtype == np.uint8
        assert picture.flags.c_contiguous
        closest = nearest(picture)
        found += closest == number
        alike += labels[closest] == labels[number]
    assert found >= share * COUNT
    assert alike >= 0.95 * COUNT


def test_mnist_itself_passes_unchanged(mnist, tmp_path):
    """So that a test digit saved as a picture is judged as in the evaluation."""
    for digit in mnist.test.images[:200, 0]:
        prepared = load_picture(saved(digit, tmp_path / "d.png"), channels=1, size=SIZE)
        np.testing.assert_array_equal(prepared[0], digit)


def test_thin_lines_are_thickened(tmp_path):
    page = np.full((600, 600), 255.0)
    page[100:500, 300:302] = 0  # a hair: 2 of 400 pixels, 0.1 of 20
    page[100:102, 200:302] = 0
    picture = load_picture(saved(page, tmp_path / "seven.png"), channels=1, size=SIZE)[0]
    middle = picture[12]
    assert middle.max() > 200
    assert 1 <= np.count_nonzero(middle > 100) <= 3
    thick = page.copy()
    thick[100:500, 280:320] = 0
    thick = load_picture(saved(thick, tmp_path / "thick.png"), channels=1, size=SIZE)[0]
    assert np.count_nonzero(thick[14] > 100) <= 3  # 40 of 400 is 2 of 20: left as it was


def test_centre_of_mass_is_the_middle_and_the_box_is_twenty(tmp_path):
    page = np.zeros((90, 300))
    page[20:60, 210:270] = 255
    page[20:40, 210:220] = 0
    picture = load_picture(saved(page, tmp_path / "x.png"), channels=1, size=SIZE)[0].astype(float)
    rows, columns = np.flatnonzero(picture.any(axis=1)), np.flatnonzero(picture.any(axis=0))
    assert columns[-1] - columns[0] + 1 == 20
    assert rows[-1] - rows[0] + 1 == 13  # 40/60 of 20
    assert abs((picture.sum(1) * np.arange(28)).sum() / picture.sum() - 13.5) <= 1
    assert abs((picture.sum(0) * np.arange(28)).sum() / picture.sum() - 13.5) <= 1


@pytest.mark.parametrize("size", [(28, 28), (32, 20), (8, 8), (3, 5)])
@pytest.mark.parametrize("style", ["digit", "object", "plain"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_style_and_size(size, style, channels, tmp_path):
    page = np.full((50, 40), 230.0)
    page[10:30, 5:30] = 20
    path = saved(page, tmp_path / "x.png")
    picture = load_picture(path, channels=channels, size=size, style=style)
    assert picture.shape == (channels, *size)
    assert picture.any()
    assert picture.flags.c_contiguous
    assert picture.flags.writeable


def test_object_fills_the_frame_light_on_dark(tmp_path):
    page = np.full((200, 200), 250.0)
    page[50:150, 80:130] = 60
    picture = load_picture(saved(page, tmp_path / "x.png"), channels=1, size=SIZE, style="object")[0]
    assert (picture[:, 7:21] > 200).all()
    assert not picture[:, :6].any()
    assert not picture[:, 22:].any()


def test_plain_is_resized_and_nothing_else(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    path = saved(pixels, tmp_path / "x.png")
    np.testing.assert_array_equal(load_picture(path, channels=3, size=(32, 32)), pixels.transpose(2, 0, 1))
    assert load_picture(path, channels=3, size=(16, 8)).mean() == pytest.approx(pixels.mean(), abs=2)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (np.array([[0, 257, 65535]], np.uint16), [0, 1, 255]),
        (np.array([[0, 70000, 65535, -9]], np.int32), [0, 255, 255, 0]),
        (np.array([[0, 7, 255]], np.int32), [0, 7, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 127, 255]),
        (np.array([[-4, 99, np.nan, np.inf]], np.float32), [0, 99, 0, 255]),
    ],
)
def test_deep_samples(samples, expected, tmp_path):
    path = tmp_path / "deep.tif"
    Image.fromarray(samples).save(path)
    picture = load_picture(path, channels=1, size=samples.shape, style="plain")
    assert picture.reshape(-1).tolist() == expected


def test_two_pieces_of_ink_both_count():
    page = np.full((200, 200), 255, np.float32)
    page[40:60, 90:110] = 0  # the dot of an i
    page[80:180, 90:110] = 0
    ink = find_ink(page)
    assert ink is not None
    assert ink.shape == (140, 20)


BLANK = {"white": np.full((40, 40), 255.0), "black": np.zeros((40, 40)), "one pixel": np.zeros((1, 1))}
BLANK["gradient"] = np.tile(np.linspace(80, 200, 60), (60, 1))
BLANK["noise"] = 128 + np.random.default_rng(0).normal(0, 2, (60, 60))


@pytest.mark.parametrize("case", BLANK)
def test_blank_picture(case, tmp_path):
    with pytest.raises(DataError, match="nothing stands out from the background"):
        load_picture(saved(BLANK[case], tmp_path / "x.png"), channels=1, size=SIZE)


def png(width: int, height: int, data: bytes = b"", colour: int = 0) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


WRONG = {
    "text": (b"This is not a picture.", "not a picture in a format read here"),
    "empty": (b"", "an empty file"),
    "bomb": (png(50_000, 50_000, zlib.compress(bytes(1000))), "pixels"),
    "huge": (png(30_000, 30_000), r"30000×30000 pixels take .* to decode; up to 400 MB"),
    "huge in colour": (png(10_000, 10_000, colour=2), r"10000×10000 pixels take .* to decode; up to 400 MB"),
    "strip": (png(40_000, 10), "40000×10 pixels; up to 32,768 on a side"),
    "no pixels": (png(0, 5), "x.png"),
    "cut": (png(9, 9, zlib.compress(bytes(90))[:5]), "damaged picture"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture in a format"),
}


@pytest.mark.parametrize("case", WRONG)
def test_no_picture_is_one_line(case, tmp_path, monkeypatch):
    monkeypatch.setattr("gammabeta.data.decode.available", lambda: 1_000_000_000)
    content, message = WRONG[case]
    path = tmp_path / "x.png"
    path.write_bytes(content)
    for channels in (1, 3):
        with pytest.raises(DataError, match=message) as caught:
            load_picture(path, channels=channels, size=SIZE)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_missing_picture_and_folder(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_picture(tmp_path / "none.png", channels=1, size=SIZE)
    with pytest.raises(DataError, match="not a plain file"):
        load_picture(tmp_path, channels=1, size=SIZE)


@pytest.mark.parametrize(("channels", "size"), [(2, (28, 28)), (1, (0, 28))])
def test_input_that_no_picture_has(channels, size, tmp_path):
    path = saved(np.eye(9) * 255, tmp_path / "x.png")
    with pytest.raises(DataError, match="1 or 3 channels"):
        load_picture(path, channels=channels, size=size)
