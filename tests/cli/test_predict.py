"""``gammabeta predict`` on many pictures: folders, standard input, bad files among good ones, tables."""

import csv
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from gammabeta import data
from gammabeta.data import Preparation


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten digits in two folders, with a hidden file and a note that are no pictures."""
    folder = tmp_path_factory.mktemp("digits")
    for number, image in enumerate(data.load("mnist").test.images[:10, 0]):
        path = folder / ("a" if number < 5 else "b/deeper") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (folder / "a" / ".hidden.png").write_text("x", "utf-8")
    (folder / "a" / "notes.txt").write_text("x", "utf-8")
    return folder


def images(result) -> list[str]:
    return [Path(row["image"]).name for row in json.loads(result.out)["predictions"]]


def test_a_folder_is_all_its_pictures(gammabeta, trained_run, digits):
    result = gammabeta("predict", trained_run, digits, "--json")
    assert result.code == 0, result.err
    assert images(result) == [f"{number}.png" for number in range(10)]
    assert (
        images(gammabeta("predict", trained_run, digits / "b", digits / "a" / "1.png", "--json"))[-1]
        == "1.png"
    )


def test_one_bad_file_does_not_lose_the_others(gammabeta, trained_run, digits, tmp_path):
    for name, content in (("text.png", b"no picture"), ("empty.png", b""), ("2.png", None)):
        if content is None:
            (tmp_path / name).write_bytes((digits / "a" / "2.png").read_bytes())
        else:
            (tmp_path / name).write_bytes(content)
    result = gammabeta("predict", trained_run, tmp_path, tmp_path / "none.png", digits / "a", "--json")
    document = json.loads(result.out)
    assert result.code == 2
    assert images(result) == ["2.png", "0.png", "1.png", "2.png", "3.png", "4.png"]
    assert [Path(row["image"]).name for row in document["errors"]] == ["empty.png", "text.png", "none.png"]
    lines = result.err.splitlines()
    assert len(lines) == 4
    for line, name in zip(lines, ("empty.png", "text.png", "none.png", "3 of 9"), strict=True):
        assert line.startswith("gammabeta: error: ")
        assert name in line
    assert gammabeta("predict", trained_run, tmp_path).out.count("\n") == 1


def test_a_folder_without_pictures_is_named(gammabeta, trained_run, tmp_path):
    result = gammabeta("predict", trained_run, tmp_path)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert "no pictures in this folder" in result.err


@pytest.mark.parametrize("kind", ["picture", "paths", "paths with zeros"])
def test_standard_input(gammabeta, trained_run, digits, monkeypatch, kind):
    paths = sorted(map(str, (digits / "a").glob("[0-9].png")))
    content = {
        "picture": (digits / "a" / "0.png").read_bytes(),
        "paths": "\n".join(paths).encode() + b"\n",
        "paths with zeros": "\0".join([*paths, ""]).encode(),
    }[kind]
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    result = gammabeta("predict", trained_run, "-", "--json")
    assert result.code == 0, result.err
    assert images(result) == (["-"] if kind == "picture" else [f"{number}.png" for number in range(5)])
    wanted = json.loads(gammabeta("predict", trained_run, paths[0], "--json").out)["predictions"][0]
    assert json.loads(result.out)["predictions"][0]["predictions"] == wanted["predictions"]


@pytest.mark.parametrize("content", [b"", b"hello\nworld\n", bytes(range(256))])
def test_standard_input_that_is_no_picture(gammabeta, trained_run, monkeypatch, content):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    result = gammabeta("predict", trained_run, "-")
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert "standard input" in result.err


def test_paths_of_which_the_first_is_missing(gammabeta, trained_run, digits, monkeypatch):
    content = f"gone.png\n{digits / 'a' / '0.png'}\n".encode()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    result = gammabeta("predict", trained_run, "-")
    assert (result.code, result.out.count("\n")) == (2, 1)
    assert "gone.png: no such file" in result.err


def test_a_table_on_a_terminal_has_no_control_sequence(gammabeta, trained_run, digits, tmp_path, monkeypatch):
    odd = tmp_path / "\x1b[31mred.png"
    odd.write_bytes((digits / "a" / "0.png").read_bytes())
    assert "\x1b" in gammabeta("predict", trained_run, odd, "--csv").out  # data for programs
    monkeypatch.setattr("gammabeta.cli.predict._on_terminal", lambda: True)
    assert "/\\x1b[31mred.png,1," in gammabeta("predict", trained_run, odd, "--csv").out


def test_standard_input_is_read_once(gammabeta, trained_run):
    assert "can be read once" in gammabeta("predict", trained_run, "-", "-").err


def test_a_table(gammabeta, trained_run, digits, tmp_path):
    odd = tmp_path / 'a "b", c.png'
    odd.write_bytes((digits / "a" / "0.png").read_bytes())
    result = gammabeta("predict", trained_run, odd, digits, "--csv", "--top", "3")
    rows = list(csv.DictReader(io.StringIO(result.out)))
    assert result.code == 0
    assert len(rows) == 33
    assert rows[0]["image"] == str(odd)
    assert [row["rank"] for row in rows[:3]] == ["1", "2", "3"]
    shares = [float(row["probability"]) for row in rows[:3]]
    assert shares == sorted(shares, reverse=True)
    assert {row["unlike"] for row in rows} <= {"yes", "no"}
    assert "give one of them" in gammabeta("predict", trained_run, odd, "--csv", "--json").err


def test_pictures_are_held_a_batch_at_a_time(gammabeta, trained_run, digits, monkeypatch):
    held, most, original = [], [], Preparation.prepared

    def prepare(self, source, **options):
        held.append(source)
        return original(self, source, **options)

    def distance(self, pictures):
        most.append(len(held))
        held.clear()
        return np.zeros(len(pictures))

    monkeypatch.setattr(Preparation, "prepared", prepare)
    monkeypatch.setattr("gammabeta.data.likeness.Likeness.distance", distance)
    monkeypatch.setattr("gammabeta.data.classify._BATCH", 4)
    assert gammabeta("predict", trained_run, digits).code == 0
    assert most == [4, 4, 2]


def test_a_picture_unlike_the_training_s_is_marked(gammabeta, trained_run, tmp_path):
    y, x = np.mgrid[-1:1:300j, -1:1:300j]
    Image.fromarray((255 * (np.hypot(x, y) < 0.7)).astype(np.uint8)).save(tmp_path / "disc.png")
    stripes = np.where((np.abs((y * 20) % 2 - 1) < 0.3) & ((x * 40).astype(int) % 3 > 0), 0, 255)
    Image.fromarray(stripes.astype(np.uint8)).save(tmp_path / "stripes.png")
    rows = json.loads(gammabeta("predict", trained_run, tmp_path, "--json").out)["predictions"]
    for row in rows:
        assert row["distance"] > 2.5
        assert "standard deviations" in row["unlike"]
        assert row["predictions"][0]["probability"] < 0.75
    line = gammabeta("predict", trained_run, tmp_path / "disc.png").out
    assert "(unlike the training pictures: " in line
    assert line.count("\n") == 1


def test_one_s_own_digits_on_paper(gammabeta, trained_run, tmp_path):
    """The run's data are an NPZ of no name; no --style is needed."""
    test = data.load("mnist").test
    for number in range(20):
        paper = Image.fromarray(255 - test.images[number, 0]).resize((140, 140), Image.Resampling.BICUBIC)
        page = Image.new("L", (300, 200), 255)
        page.paste(paper, (7 * number, 2 * number))
        page.save(tmp_path / f"{number:02}.png")
    rows = json.loads(gammabeta("predict", trained_run, tmp_path, "--json").out)["predictions"]
    right = [
        row["predictions"][0]["class"] == str(label) for row, label in zip(rows, test.labels, strict=False)
    ]
    assert sum(right) >= 14
    assert json.loads((trained_run / "run.json").read_text())["network"]["preparation"]["style"] == "digit"


def test_what_the_network_saw_is_drawn(gammabeta, trained_run, digits, tmp_path):
    for target in (tmp_path / "seen.png", tmp_path / "folder"):
        result = gammabeta("predict", trained_run, digits, "--show", target)
        assert result.code == 0, result.err
        written = target if target.suffix else target / "predictions.png"
        assert str(written) in result.err
        with Image.open(written) as picture:
            assert min(picture.size) > 200
    assert "--show writes a PNG" in gammabeta("predict", trained_run, digits, "--show", "x.pdf").err


def test_doubt_is_told_everywhere(gammabeta, trained_run, digits, tmp_path):
    page = Image.new("L", (300, 120), 255)
    for place in (10, 110, 210):
        with Image.open(digits / "a" / "0.png") as digit:
            page.paste(Image.fromarray(255 - np.asarray(digit)).resize((84, 84)), (place, 20))
    page.save(tmp_path / "three.png")
    (row,) = json.loads(gammabeta("predict", trained_run, tmp_path, "--json").out)["predictions"]
    assert row["doubt"] is True
    assert row["why"].startswith("3 pieces found")
    (cells,) = csv.DictReader(io.StringIO(gammabeta("predict", trained_run, tmp_path, "--csv").out))
    assert (cells["doubt"], cells["why"]) == ("yes", row["why"])
    assert "3 pieces found" in gammabeta("predict", trained_run, tmp_path).out


def test_a_face_is_no_digit(gammabeta, trained_run, tmp_path):
    """Brows, eyes, nose and mouth: each as dark as ink, none of them much of the whole."""
    face = Image.new("L", (120, 140), 225)
    for box in ((30, 20, 52, 27), (64, 18, 92, 27), (36, 40, 46, 55), (76, 40, 86, 55), (56, 62, 66, 82),
                (40, 104, 80, 112)):  # fmt: skip
        face.paste(40, box)
    face.save(tmp_path / "face.png")
    document = json.loads(gammabeta("predict", trained_run, tmp_path / "face.png", "--json").out)
    (row,) = document["predictions"]
    assert row["doubt"]
    assert row["why"].startswith("the ink is in 6 pieces")


def test_python_and_the_command_give_the_same(gammabeta, trained_run, digits):
    import gammabeta as gb

    paths = sorted(digits.rglob("[0-9].png"))
    rows = json.loads(gammabeta("predict", trained_run, *paths, "--json", "--top", 3).out)["predictions"]
    model = gb.load(trained_run)
    from_paths = model.predict(paths, top=3)
    with Image.open(paths[0]) as picture:
        from_image = model.predict(picture)
        from_array = model.predict(np.asarray(picture))
    several = model.predict(data.load("mnist").test.images[:10])
    for row, answer, alike in zip(rows, from_paths, several, strict=True):
        assert [tuple(guess.values()) for guess in row["predictions"]] == list(answer.top)
        assert (row["doubt"], row["why"], row["image"]) == (answer.doubt, answer.why, answer.image)
        assert (alike.label, alike.probability) == (answer.label, answer.probability)
    assert from_image.top == from_array.top == from_paths[0].top[:1]
    assert str(from_paths[0]).startswith(f"{paths[0]}: {from_paths[0].label} ")
    with pytest.raises(gb.errors.DataError, match="uint8 array"):
        model.predict(np.zeros((28, 28)))


def test_the_temperature_is_the_run_s_and_the_file_s(gammabeta, trained_run, digits, tmp_path):
    import gammabeta as gb

    temperature = json.loads((trained_run / "run.json").read_text())["network"]["temperature"]
    assert temperature != 1.0
    file = tmp_path / "model.onnx"
    assert gammabeta("export", trained_run, "--out", file).code == 0
    model = gb.load(file)
    assert model.temperature == temperature
    picture = digits / "a" / "0.png"
    one, other = model.predict(picture), gb.load(trained_run).predict(picture)
    assert gb.predict(trained_run, picture).top == other.top
    assert gb.predict(str(file), picture).top == gb.predict(model, picture).top == one.top
    assert one.label == other.label
    assert one.probability == pytest.approx(other.probability, abs=1e-5)


def test_no_picture_that_had_to_be_prepared_is_made_surer():
    from gammabeta.data.classify import Classifier

    preparation = data.load("mnist").settled().preparation
    shares = np.array([[0.7, 0.3]], np.float32)
    sure = shares ** (1 / 0.5) / (shares ** (1 / 0.5)).sum()
    classifier = Classifier(("a", "b"), preparation, lambda pictures: sure.repeat(len(pictures), 0), 0.5)
    digit = data.load("mnist").test.images[3, 0]
    paper = np.pad(np.kron(255 - digit, np.ones((6, 6), np.uint8)), 20, constant_values=255)
    as_trained, brought = classifier.predict([digit, paper])
    assert as_trained.probability == pytest.approx(float(sure[0, 0]))
    assert brought.probability == pytest.approx(0.7)
