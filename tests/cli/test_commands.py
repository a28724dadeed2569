import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gammabeta as gb
from gammabeta import data

Call = Callable[..., tuple[int, str, str]]


def test_version_and_help(gammabeta: Call) -> None:
    assert gammabeta("--version")[1] == f"gammabeta {gb.__version__}\n"
    code, out, _ = gammabeta("--help")
    assert code == 0
    for command in ("train", "evaluate", "predict", "info", "bench", "reproduce", "lab"):
        assert f"\n│ {command} " in out
        assert gammabeta(command, "--help")[0] == 0


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from gammabeta.cli.app import run; run(['--help']);"
        "print([m for m in ('torch', 'numba', 'matplotlib', 'numpy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_unknown_command(gammabeta: Call) -> None:
    code, _, err = gammabeta("trian")
    assert (code, err.count("\n")) == (2, 1)
    assert "No such command 'trian'" in err


def test_info_names_versions_and_machine(gammabeta: Call) -> None:
    code, out, _ = gammabeta("info", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["versions"]["gammabeta"] == gb.__version__
    assert document["machine"]["threads"] >= 1
    assert "instruction set" in gammabeta("info")[1]


def test_evaluate_judges_and_draws(gammabeta: Call, trained_run: Path, tmp_path: Path) -> None:
    code, out, _ = gammabeta("evaluate", trained_run, "--out", tmp_path, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["count"] == 200
    assert np.trace(document["confusion"]) == document["correct"]
    for picture in document["pictures"]:
        with Image.open(picture) as image:
            assert min(image.size) > 150
    assert f"accuracy {document['accuracy']} (" in gammabeta("evaluate", trained_run, "--out", tmp_path)[1]


def test_figures_are_printed_where_no_picture_can_be_written(
    gammabeta: Call, trained_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()  # no folder can be made in it, even by root
    code, out, err = gammabeta("evaluate", trained_run, "--out", tmp_path / "file" / "pictures")
    assert code == 2
    assert "accuracy 0." in out
    assert err.count("\n") == 1
    code, out, _ = gammabeta("evaluate", trained_run, "--out", tmp_path / "file" / "pictures", "--json")
    document = json.loads(out)
    assert (code, document["count"], document["pictures"]) == (2, 200, [])


def test_evaluate_on_other_data(gammabeta: Call, trained_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "colour.npz"
    images, labels = np.zeros((20, 28, 28, 3), np.uint8), np.arange(20) % 10
    np.savez(other, x_train=images, y_train=labels, x_test=images, y_test=labels)
    code, _, err = gammabeta("evaluate", trained_run, "--data", other)
    assert code == 2
    assert "the network takes" in err


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_what_is_no_run_is_refused(gammabeta: Call, tmp_path: Path, command: str) -> None:
    picture = tmp_path / "picture.png"
    Image.new("L", (28, 28)).save(picture)
    for run in (tmp_path, tmp_path / "nowhere"):
        code, _, err = gammabeta(command, run, *([picture] if command == "predict" else []))
        assert (code, err.count("\n")) == (2, 1)
        assert "run folder" in err


def test_predict_names_the_digit(gammabeta: Call, trained_run: Path, tmp_path: Path) -> None:
    test = data.load("mnist").test
    paths = []
    for number in range(20):
        paths.append(tmp_path / f"{number}.png")
        dark_ink = Image.fromarray(255 - test.images[number, 0]).resize((140, 140), Image.Resampling.BICUBIC)
        dark_ink.save(paths[-1])
    code, out, _ = gammabeta("predict", trained_run, *paths, "--json", "--top", 2, "--style", "digit")
    rows = json.loads(out)["predictions"]
    assert code == 0
    best = [row["predictions"][0] for row in rows]
    assert sum(guess["class"] == str(label) for guess, label in zip(best, test.labels, strict=False)) >= 14
    assert all(0 < guess["probability"] <= 1 for guess in best)
    assert gammabeta("predict", trained_run, paths[0])[1].startswith(f"{paths[0]}: ")


def test_predict_refuses_what_is_no_picture(gammabeta: Call, trained_run: Path, tmp_path: Path) -> None:
    fake = tmp_path / "fake.png"
    fake.write_text("not a picture", "utf-8")
    code, out, err = gammabeta("predict", trained_run, fake)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "fake.png" in err


def test_compare_tells_what_differs(
    gammabeta: Call, trained_run: Path, digits_file: Path, tmp_path: Path
) -> None:
    twin = tmp_path / "twin"
    assert (
        gammabeta("train", digits_file, "-r", "fast", "-o", twin, "--no-batch-norm", "--epochs", 1, "-q")[0]
        == 0
    )
    code, out, _ = gammabeta("compare", trained_run, twin, "--out", tmp_path / "both.png", "--json")
    first, second = json.loads(out)["runs"]
    assert code == 0
    assert (first["settings"]["batch_norm"], second["settings"]["batch_norm"]) == (True, False)
    assert "momentum" not in first["settings"]
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert "batch_norm" in gammabeta("compare", trained_run, twin, "-o", tmp_path / "both.png")[1]


def test_compare_prints_its_figures_where_no_picture_can_be_written(
    gammabeta: Call, trained_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "both.png"
    code, shown, err = gammabeta("compare", trained_run, trained_run, "-o", out, "--json")
    document = json.loads(shown)
    assert (code, len(document["runs"]), document["picture"], err.count("\n")) == (2, 2, None, 1)
    code, shown, _ = gammabeta("compare", trained_run, trained_run, "-o", out)
    assert code == 2
    assert "finished" in shown


def test_tensorboard_events_are_written(gammabeta: Call, digits_file: Path, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    assert (
        gammabeta("train", digits_file, "-r", "fast", "-o", run, "--epochs", 1, "-q", "--tensorboard")[0] == 0
    )
    events = event_accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"progress/loss", "evaluation/test/accuracy", "statistics/bn1/percentile_50"} <= set(tags)


def test_tensorboard_asked_for_and_missing(
    gammabeta: Call, digits_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gammabeta.train.trackers.find_spec", lambda _: None)
    code, _, err = gammabeta("train", digits_file, "-r", "fast", "-o", tmp_path / "run", "--tensorboard")
    assert (code, err.count("\n")) == (2, 1)
    assert ".[tensorboard]" in err
    assert not (tmp_path / "run").exists()
