import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from gammabeta.train import Run

Call = Callable[..., tuple[int, str, str]]


def test_train_prints_the_notebooks_line_and_where_the_run_lies(
    gammabeta: Call, digits_file: Path, tmp_path: Path
) -> None:
    code, out, err = gammabeta("train", digits_file, "--recipe", "classic", "--out", tmp_path / "run")
    assert code == 0
    assert re.search(r"^Epoch 0\. Loss: \d\.\d+, Train_acc 0\.\d+, Test_acc 0\.\d+$", out, re.MULTILINE)
    assert f"The run is in {tmp_path / 'run'}" in out
    assert err == ""


def test_json_is_one_object_on_standard_output(gammabeta: Call, digits_file: Path, tmp_path: Path) -> None:
    code, out, err = gammabeta("train", digits_file, "-r", "classic", "-o", tmp_path / "run", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["run"] == str(tmp_path / "run")
    assert set(document["seconds"]) == {
        "load",
        "prepare",
        "train",
        "first_step",
        "watch",
        "recalibrate",
        "evaluate",
    }
    assert "Epoch 0." in err


def test_every_field_can_be_set(gammabeta: Call, digits_file: Path, tmp_path: Path) -> None:
    code, _, _ = gammabeta(
        "train", digits_file, "-o", tmp_path / "run", "--epochs", 0.5, "--batch-size", 16,
        "--learning-rate", 0.05, "--precision", "fp32", "--no-batch-norm",
        "--set", "label_smoothing=0", "-s", "schedule=cosine", "-q",
    )  # fmt: skip
    recipe = Run.open(tmp_path / "run").recipe
    assert code == 0
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate, recipe.schedule) == (
        0.5,
        16,
        0.05,
        "cosine",
    )
    assert (recipe.batch_norm, recipe.label_smoothing) == (False, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "nonesuch"], "unknown recipe 'nonesuch'"),
        (["--set", "colour=red"], "unknown recipe field 'colour'"),
        (["--set", "epochs=soon"], "epochs = 'soon'"),
        (["--batch-size", "1"], "batch_size = '1'"),
        (["--batch-size", "many"], "valid integer"),
        (["--learning-rate", "-1"], "learning_rate = '-1.0'"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--holdout", "640"], "cannot hold out 640"),
        (["--seed", "-1"], "--seed"),
        (["--nonesuch"], "No such option"),
        (["--image-size", "large"], "'large' is not HxW"),
        (["--image-size", "32x32"], "only pictures in folders are resized"),
    ],
)
def test_mistakes_get_one_line_exit_code_2_and_nothing_written(
    gammabeta: Call,
    digits_file: Path,
    tmp_path: Path,
    arguments: list[str],
    words: str,
) -> None:
    code, _, err = gammabeta("train", digits_file, "--out", tmp_path / "run", *arguments)
    assert code == 2
    assert err.startswith("gammabeta: error: ")
    assert err.count("\n") == 1
    assert words in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none(gammabeta: Call, digits_file: Path, tmp_path: Path) -> None:
    code, _, err = gammabeta("train", digits_file, "--out", tmp_path / "run", "--device", "cuda")
    assert code == 2
    assert "use --device cpu" in err
    assert not (tmp_path / "run").exists()


def test_unknown_data_is_one_line(gammabeta: Call, tmp_path: Path) -> None:
    code, _, err = gammabeta("train", "nonesuch", "--out", tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "mnist" in err


def test_an_output_folder_that_cannot_be_written(gammabeta: Call, digits_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, _, err = gammabeta("train", digits_file, "--out", tmp_path / "file" / "run")
    assert code == 2
    assert "choose another folder with --out" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_readable_run(
    digits_file: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "gammabeta",
        "train",
        str(digits_file),
        "-o",
        str(run),
        "--epochs",
        "9999",
    ]
    child = subprocess.Popen(
        [*command, "--epochs", "9999", "--precision", "fp32"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        _wait_for(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 0)
        child.send_signal(number)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == code
    assert "Interrupted" in out
    assert "Traceback" not in err
    assert Run.open(run).info.status == "interrupted"
    assert (run / "model.safetensors").exists()


def _wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the training did not start"
        time.sleep(0.05)


def test_pictures_of_any_size_are_brought_to_one(gammabeta: Call, tmp_path: Path) -> None:
    for split, many in (("train", 12), ("test", 4)):
        for name, shade in (("dark", 40), ("light", 200)):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for number in range(many):
                Image.new("RGB", (30 + number, 40), (shade, shade, number)).save(folder / f"{number}.png")
    settings = ["--out", tmp_path / "run", "--epochs", 2, "--set", "batch_size=4", "-q"]
    code, _, err = gammabeta("train", tmp_path / "pictures", *settings, "--image-size", "20x24")
    assert (code, err) == (0, "")
    network = Run.open(tmp_path / "run").info.network
    assert (network.channels, network.height, network.width) == (3, 20, 24)
    assert network.classes == ["dark", "light"]
    assert gammabeta("evaluate", tmp_path / "run")[0] == 0
    assert gammabeta("predict", tmp_path / "run", tmp_path / "pictures" / "test" / "dark" / "0.png")[0] == 0
