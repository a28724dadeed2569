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
    held, most, original = [], [], Preparation.prepare

    def prepare(self, source, **options):
        held.append(source)
        return original(self, source, **options)

    def distance(self, pictures):
        most.append(len(held))
        held.clear()
        return np.zeros(len(pictures))

    monkeypatch.setattr(Preparation, "prepare", prepare)
    monkeypatch.setattr("gammabeta.data.likeness.Likeness.distance", distance)
    monkeypatch.setattr("gammabeta.cli.predict._BATCH", 4)
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
