"""The data of a run: its classes found by name, its images found by content, wherever they lie."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from rich.console import Console

from gammabeta.cli.model import find_model, load_batches
from gammabeta.cli.training import Reporter
from gammabeta.train import Run
from gammabeta.train.fitting import Observer, TrainingInterrupted
from gammabeta.train.loop import Progress
from gammabeta.train.session import dataset_sha256, train_run

Call = Callable[..., tuple[int, str, str]]

TRAIN = ("-r", "fast", "--epochs", 3, "--set", "batch_size=8", "--precision", "fp32", "-q")


def bar(place: int, random: np.random.Generator) -> np.ndarray:
    """A picture whose class is the place of its white bar."""
    pixels = random.integers(0, 60, (16, 16), np.uint8)
    pixels[:, 1 + place : 3 + place] = 250
    return pixels


def folder(path: Path, names: dict[str, int], many: int = 12, seed: int = 0) -> Path:
    """A folder of pictures; each class has its name and the place of its bar."""
    random = np.random.default_rng(seed)
    for name, place in names.items():
        (path / name).mkdir(parents=True)
        for number in range(many):
            Image.fromarray(bar(place, random)).save(path / name / f"{number}.png")
    return path


@pytest.fixture(scope="module")
def pets_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two classes that it tells apart."""
    from gammabeta.cli.app import run

    place = tmp_path_factory.mktemp("pets")
    pets = folder(place / "pets", {"cat": 0, "dog": 9}, 40)
    arguments = ["train", pets, "-o", place / "run", *TRAIN, "--epochs", 8]
    assert run([str(argument) for argument in arguments]) == 0
    assert Run.open(place / "run").info.result["test_accuracy"] == 1
    return place / "run"


def judged(gammabeta: Call, run: Path, *arguments: object) -> dict:
    code, out, err = gammabeta("evaluate", run, "--json", *arguments)
    assert code == 0, err
    return json.loads(out)


def test_labels_mean_the_same_in_another_order_and_case(gammabeta: Call, pets_run: Path, tmp_path: Path):
    other = folder(tmp_path / "other", {"Dog": 9, "CAT": 0})
    found = judged(gammabeta, pets_run, "--data", other, "--out", tmp_path)
    assert found["accuracy"] == 1
    assert found["classes"] == ["cat", "dog"]
    assert "CAT = cat" in found["notes"][0]
    _, out, err = gammabeta("evaluate", pets_run, "--data", other, "--out", tmp_path)
    assert "Dog = dog" in out + err


@pytest.mark.parametrize("command", ["evaluate", "doctor", "fold"])
def test_classes_that_cannot_be_matched_are_refused(
    gammabeta: Call, pets_run: Path, tmp_path: Path, command: str
):
    wrong = folder(tmp_path / "wrong", {"ant": 0, "zebra": 9}, 3)
    code, _, err = gammabeta(command, pets_run, "--data", wrong)
    assert (code, err.count("\n")) == (2, 1)
    for name in ("ant", "zebra", "cat", "dog"):
        assert repr(name) in err


def test_folders_in_the_order_of_letters_and_labels_in_that_of_numbers(gammabeta: Call, tmp_path: Path):
    digits = folder(tmp_path / "digits", {str(number): number for number in range(12)}, 10)
    assert gammabeta("train", digits, "-o", tmp_path / "run", *TRAIN)[0] == 0
    random = np.random.default_rng(1)
    labels = np.arange(96) % 12
    images = np.stack([bar(label, random) for label in labels])
    np.savez(tmp_path / "digits.npz", images=images, labels=labels)
    subject = find_model(str(tmp_path / "run"))
    batches = [*load_batches(subject, str(tmp_path / "digits.npz"), "train", 64)]
    classes = Run.open(tmp_path / "run").info.network.classes
    assert classes[:4] == ["0", "1", "10", "11"]
    for x, y in batches:  # as doctor and evaluate get them: the bar stands where the class's name says
        places = (x.mean((1, 2)) > x.mean() + 1).float().argmax(1) - 1
        assert places.tolist() == [int(classes[label]) for label in y]


def test_figures_of_each_class(gammabeta: Call, pets_run: Path, tmp_path: Path):
    images = np.stack([bar(place, np.random.default_rng(2)) for place in (9, 9, 9, 0)])
    # The third is a cat's picture under a dog's name.
    np.savez(tmp_path / "d.npz", x_train=images, y_train=[1, 1, 1, 0], x_test=images[[0, 1, 3]],
             y_test=[1, 1, 1], classes=["cat", "dog"])  # fmt: skip
    found = judged(gammabeta, pets_run, "--data", tmp_path / "d.npz", "--out", tmp_path)
    cat, dog = found["by_class"]
    assert dog == {
        "class": "dog",
        "f1": 0.8,
        "count": 3,
        "predicted": 2,
        "correct": 2,
        "accuracy": pytest.approx(2 / 3),
        "precision": 1,
        "recall": pytest.approx(2 / 3),
    }
    assert (cat["count"], cat["predicted"], cat["precision"], cat["recall"]) == (0, 1, 0, None)
    assert found["notes"] == ["no test pictures of 'cat'"]
    code, out, err = gammabeta("evaluate", pets_run, "--data", tmp_path / "d.npz", "--out", tmp_path)
    assert code == 0
    assert "precision" in out
    assert "no test pictures of 'cat'" in out + err


def test_moved_data_are_named_and_known_by_their_content(gammabeta: Call, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "pets", {"cat": 0, "dog": 9})
    assert gammabeta("train", "pets", "-o", "run", *TRAIN)[0] == 0
    assert Run.open("run").info.data == "pets"
    before = judged(gammabeta, Path("run"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert judged(gammabeta, Path("../run"))["confusion"] == before["confusion"]
    shutil.move(tmp_path / "pets", tmp_path / "moved")
    for command in ("evaluate", "fold", "doctor"):
        code, _, err = gammabeta(command, "../run")
        assert (code, err.count("\n")) == (2, 1)
        assert "--data" in err
        assert gammabeta(command, "../run", "--data", "../moved")[0] in (
            0,
            1,
        )  # 1: the doctor found something
    assert judged(gammabeta, Path("../run"), "--data", "../moved")["confusion"] == before["confusion"]
    shutil.copytree(tmp_path / "moved", tmp_path / "pets")
    Image.new("L", (16, 16)).save(tmp_path / "pets" / "cat" / "new.png")
    assert "has changed since the training" in judged(gammabeta, Path("../run"))["notes"][0]


class _StopSoon(Observer):
    def progressed(self, progress: Progress, seconds: float) -> None:
        self.stop = progress.step >= 2

    def stop_requested(self) -> bool:
        return self.stop


def test_resume_takes_the_same_data_from_another_place(gammabeta: Call, tmp_path: Path, monkeypatch):
    from gammabeta.train.recipe import load_recipe
    from gammabeta.train.run import Job

    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "pets", {"cat": 0, "dog": 9})
    job = Job("pets", load_recipe("fast", ["epochs=2", "batch_size=4", "precision=fp32"]), device="cpu")
    with pytest.raises(TrainingInterrupted):
        train_run(job.load(), job, Path("run"), _StopSoon())
    shutil.move(tmp_path / "pets", tmp_path / "moved")
    other = folder(tmp_path / "other", {"cat": 0, "dog": 9}, seed=5)
    code, _, err = gammabeta("train", "--resume", "run")
    assert (code, "--data" in err) == (2, True)
    code, _, err = gammabeta("train", "--resume", "run", "--data", other)
    assert (code, "is not what run was trained on" in err) == (2, True)
    assert gammabeta("train", "--resume", "run", "--data", "moved", "-q")[0] == 0
    run = Run.open("run")
    assert (run.info.status, run.info.data, run.info.data_path) == (
        "finished",
        "moved",
        str(tmp_path / "moved"),
    )
    assert judged(gammabeta, Path("run"))["count"] == 4


def test_the_printed_line_works_from_anywhere(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    screen = Console(file=io.StringIO(), soft_wrap=True)
    with pytest.raises(typer.Exit), Reporter(screen, quiet=True).training(Path("my runs") / "a"):
        raise KeyboardInterrupt
    assert f"gammabeta train --resume '{tmp_path / 'my runs' / 'a'}'" in screen.file.getvalue()


def sorted_file(path: Path) -> Path:
    random = np.random.default_rng(3)
    labels = np.repeat(np.arange(4), (40, 20, 20, 1))
    images = np.stack([bar(label, random) for label in labels])
    np.savez(path, x_train=images, y_train=labels, x_test=images[::5], y_test=labels[::5])
    return path


def test_images_are_held_out_of_every_class_by_the_seed(gammabeta: Call, tmp_path: Path):
    data = sorted_file(tmp_path / "sorted.npz")
    tests = []
    for seed in (0, 0, 1):
        run = tmp_path / f"run{len(tests)}"
        assert gammabeta("train", data, "-o", run, "--holdout", 20, "--seed", seed, *TRAIN)[0] == 0
        held = Run.open(run).job.load()
        assert np.bincount(held.test.labels, minlength=4).tolist() == [10, 5, 5, 0]
        assert len(held.train) == 61
        tests.append(dataset_sha256(held))
    assert tests[0] == tests[1] != tests[2]
    found = judged(gammabeta, run)
    assert found["count"] == 20
    moved = shutil.copy(data, tmp_path / "moved.npz")
    assert judged(gammabeta, run, "--data", moved)["confusion"] == found["confusion"]
    code, _, err = gammabeta("train", data, "-o", tmp_path / "no", "--holdout", 78, "-q")
    assert (code, err.count("\n")) == (2, 1)
    assert "between 1 and 77" in err


def test_a_run_of_an_earlier_version_keeps_what_it_held_out(gammabeta: Call, tmp_path: Path):
    data = sorted_file(tmp_path / "sorted.npz")
    assert gammabeta("train", data, "-o", tmp_path / "run", "--holdout", 20, *TRAIN)[0] == 0
    file = tmp_path / "run" / "run.json"
    document = json.loads(file.read_text("utf-8"))
    for field in ("holdout_rule", "data_path", "skip_damaged", "data_sha256"):
        del document[field]
    file.write_text(json.dumps(document), "utf-8")
    labels = Run.open(tmp_path / "run").job.load().test.labels
    assert np.bincount(labels, minlength=4).tolist() == [0, 0, 19, 1]  # the last 20


def test_damaged_pictures_are_passed_over_in_the_whole_life_of_a_run(gammabeta: Call, tmp_path: Path):
    pets = folder(tmp_path / "pets", {"cat": 0, "dog": 9})
    (pets / "dog" / "3.png").write_bytes((pets / "dog" / "3.png").read_bytes()[:60])
    (pets / "cat" / "4.png").write_bytes(b"")
    code, _, err = gammabeta("train", pets, "-o", tmp_path / "run", *TRAIN)
    assert (code, err.count("\n")) == (2, 1)
    assert "3.png" in err
    assert "4.png" in err
    code, out, err = gammabeta("train", pets, "-o", tmp_path / "run", "--skip-damaged", *TRAIN)
    assert code == 0
    assert (out + err).count("passed over") == 2
    assert judged(gammabeta, tmp_path / "run")["count"] == 4
    assert gammabeta("evaluate", tmp_path / "run", "--data", pets, "--skip-damaged")[0] == 0


def test_the_best_epoch_is_not_chosen_on_the_test_images(gammabeta: Call, tmp_path: Path):
    for part, seed in (("train", 0), ("val", 1), ("test", 2)):
        folder(tmp_path / "pets" / part, {"cat": 0, "dog": 9}, 8, seed)
    code, _, err = gammabeta(
        "train", tmp_path / "pets", "-o", tmp_path / "run", *TRAIN, "-s", "evaluate=epoch"
    )
    assert code == 0, err
    rows = [row for row in Run.open(tmp_path / "run").metrics() if row["kind"] == "evaluation"]
    assert [row["split"] for row in rows] == ["train", "validation"] * 3 + ["test"]
    assert (tmp_path / "run" / "best.safetensors").exists()
    result = Run.open(tmp_path / "run").info.result
    assert (result["test_accuracy"], result["validation_accuracy"]) == (
        rows[-1]["accuracy"],
        rows[-2]["accuracy"],
    )
    found = judged(gammabeta, tmp_path / "run", "--split", "validation")
    assert (found["split"], found["notes"]) == ("validation", [])
    document = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    document["data_sha256"] = dataset_sha256(replace(Run.open(tmp_path / "run").job.load(), validation=None))
    (tmp_path / "run" / "run.json").write_text(json.dumps(document), "utf-8")  # as 0.1.0 wrote it
    assert judged(gammabeta, tmp_path / "run")["notes"] == []


def test_words_that_lead_to_the_remedy(gammabeta: Call, pets_run: Path, tmp_path: Path):
    random = np.random.default_rng(0)
    np.savez(
        tmp_path / "s.npz", images=random.integers(0, 256, (20, 8, 8), np.uint8), labels=np.arange(20) % 2
    )
    _, _, err = gammabeta("train", tmp_path / "s.npz", "-r", "fast", "-o", tmp_path / "run", "-q")
    assert "--image-size" in err
    code, _, err = gammabeta("predict", tmp_path / "model.ONNX", tmp_path / "s.png")
    assert code == 2
    assert "run folder" not in err
    code, _, err = gammabeta("train", "mnist", "--data", "mnist")
    assert (code, "choose one" in err) == (2, True)
