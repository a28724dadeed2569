"""The same picture gets the same answer: evaluated, predicted, folded, and from the ONNX file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import gammabeta as gb
from gammabeta import data
from gammabeta.cli.app import run as command_line
from gammabeta.train import Run, load_model

SHAPES = ("bar", "disc", "ring")
SIZES = ((90, 160), (108, 192), (160, 90), (120, 160), (45, 80))


def photograph(shape: str, size: tuple[int, int], random: np.random.Generator) -> Image.Image:
    """A coloured shape somewhere near the middle of a noisy ground, both of any colour."""
    width, height = size
    ground = random.integers(0, 90, 3) + random.normal(0, 8, (height, width, 3))
    picture = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))
    x, y = width / 2 + random.integers(-4, 5), height / 2 + random.integers(-4, 5)
    r = min(size) * random.uniform(0.25, 0.4)
    colour = tuple(int(value) for value in random.integers(150, 256, 3))
    draw = ImageDraw.Draw(picture)
    if shape == "disc":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=max(2, round(r / 4)))
    else:
        draw.rectangle((x - r, y - r / 5, x + r, y + r / 5), fill=colour)
    return picture


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of several proportions, most of them 9:16; JPEG, PNG, and one with alpha."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(3)
    for part, count in (("train", 40), ("test", 15)):
        for shape in SHAPES:
            (folder / part / shape).mkdir(parents=True)
            for number in range(count):
                picture = photograph(shape, SIZES[number % len(SIZES)], random)
                suffix = "png" if number % 3 else "jpg"
                picture.save(folder / part / shape / f"{number:02}.{suffix}")
    return folder


@pytest.fixture(scope="module")
def photo_run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    settings = [
        "--recipe",
        "fast",
        "--epochs",
        "8",
        "--image-size",
        "32x32",
        "--set",
        "batch_size=16",
        "--quiet",
    ]
    assert command_line(["train", str(photos), "--out", str(path), *settings]) == 0
    return path


def answers(gammabeta, source, photos) -> dict[str, str]:
    paths = sorted((photos / "test").rglob("*.*"))
    result = gammabeta("predict", source, *paths, "--json")
    assert result.code == 0, result.err
    rows = json.loads(result.out)["predictions"]
    return {row["image"]: row["predictions"][0]["class"] for row in rows}


def test_evaluate_and_predict_agree_on_every_picture(gammabeta, photos, photo_run, tmp_path):
    trained = load_model(photo_run, "cpu")
    split = data.load(photos, preparation=trained.preparation).test
    judged = trained.evaluate(split, keep_probabilities=True).probabilities
    paths = sorted((photos / "test").rglob("*.*"))
    names = trained.run.info.network.classes
    wanted = {str(path): names[int(row.argmax())] for path, row in zip(paths, judged, strict=True)}
    assert answers(gammabeta, photo_run, photos) == wanted

    file = tmp_path / "model.onnx"
    assert gammabeta("export", photo_run, "--out", file).code == 0
    assert answers(gammabeta, file, photos) == wanted

    program = tmp_path / "model.pt2"
    assert gammabeta("fold", photo_run, "--out", program).code == 0
    extra = {"gammabeta": ""}
    folded = torch.export.load(program, extra_files=extra).module()
    described = json.loads(extra["gammabeta"])["preprocessing"]
    assert described["preparation"]["fit"] == "crop"
    mean, scale = (torch.tensor(described[name]).view(-1, 1, 1) for name in ("mean", "scale"))
    pictures = np.stack([trained.preparation.prepare(path) for path in paths])
    logits = folded((torch.from_numpy(pictures).float() - mean) * scale)
    assert [names[int(at)] for at in logits.argmax(1)] == list(wanted.values())


def test_the_figures_of_evaluate_are_those_of_predict(gammabeta, photos, photo_run):
    """By the commands alone, as a user would see it."""
    document = json.loads(gammabeta("evaluate", photo_run, "--json").out)
    predicted = answers(gammabeta, photo_run, photos)
    table = np.zeros((3, 3), int)
    for path, name in predicted.items():
        table[SHAPES.index(Path(path).parent.name), SHAPES.index(name)] += 1
    assert table.tolist() == document["confusion"]
    assert document["accuracy"] > 0.8


def test_a_prepared_picture_has_the_bits_of_training(photos, photo_run):
    preparation = Run.open(photo_run).preparation
    dataset = data.load(photos, size=(32, 32))
    for part, split in (("train", dataset.train), ("test", dataset.test)):
        for path, image in zip(sorted((photos / part).rglob("*.*")), split.images, strict=True):
            np.testing.assert_array_equal(preparation.prepare(path), image, err_msg=str(path))
    assert preparation.like is not None
    assert (preparation.style, preparation.fit, preparation.size) == ("plain", "crop", (32, 32))


def test_the_onnx_file_keeps_the_whole_preparation(gammabeta, photo_run, tmp_path):
    from gammabeta.data.onnxfile import OnnxClassifier

    assert gammabeta("export", photo_run, "--out", tmp_path / "m.onnx").code == 0
    assert OnnxClassifier.open(tmp_path / "m.onnx").preparation == Run.open(photo_run).preparation


def test_a_run_without_a_preparation_predicts_as_it_did(gammabeta, photos, photo_run, tmp_path):
    """As 0.1.0 wrote it: cropped in training, stretched in prediction, the style by the data set's name."""
    document = json.loads((photo_run / "run.json").read_text("utf-8"))
    del document["network"]["preparation"]
    (tmp_path / "run.json").write_text(json.dumps(document), "utf-8")
    (tmp_path / "recipe.toml").write_bytes((photo_run / "recipe.toml").read_bytes())
    run = Run.open(tmp_path)
    assert (run.preparation.style, run.preparation.fit, run.preparation.like) == ("plain", "stretch", None)
    path = photos / "test" / "bar" / "01.png"
    with Image.open(path) as picture:
        stretched = picture.resize((32, 32), Image.Resampling.LANCZOS, reducing_gap=3.0)
    np.testing.assert_array_equal(run.preparation.prepare(path), np.asarray(stretched).transpose(2, 0, 1))
    assert run.job.preparation is not None
    assert run.job.preparation.fit == "crop"


def test_the_doctor_sees_what_training_saw(gammabeta, photos, photo_run, monkeypatch):
    """Pictures of any size go through the run's preparation, whatever their folder would teach."""
    seen, original = [], gb.data.Preparation.prepare

    def prepare(self, *arguments, **options):
        seen.append(self)
        return original(self, *arguments, **options)

    monkeypatch.setattr(gb.data.Preparation, "prepare", prepare)
    assert gammabeta("doctor", photo_run, "--data", photos, "--json").code in (0, 1)
    assert len(seen) == 165
    assert all(each == Run.open(photo_run).preparation for each in seen)
