import io
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
from rich.console import Console

from gammabeta.cli.training import Reporter, line_due, stop_on_signals
from gammabeta.train import Run
from gammabeta.train.loop import Progress as Standing

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
        "compile",
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
    code, _, err = gammabeta("train", digits_file, "-r", "fast", "--out", tmp_path / "run", *arguments)
    assert code == 2
    assert err.startswith("gammabeta: error: ")
    assert err.count("\n") == 1
    assert words in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none(gammabeta: Call, digits_file: Path, tmp_path: Path) -> None:
    code, _, err = gammabeta(
        "train", digits_file, "-r", "fast", "--out", tmp_path / "run", "--device", "cuda"
    )
    assert code == 2
    assert "use --device cpu" in err
    assert not (tmp_path / "run").exists()


def test_unknown_data_is_one_line(gammabeta: Call, tmp_path: Path) -> None:
    code, _, err = gammabeta("train", "nonesuch", "--out", tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "mnist" in err


def test_an_output_folder_that_cannot_be_written(gammabeta: Call, digits_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, _, err = gammabeta("train", digits_file, "-r", "fast", "--out", tmp_path / "file" / "run")
    assert code == 2
    assert "choose another folder with --out" in err


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_leaves_a_readable_run(
    digits_file: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run = tmp_path / "run"
    settings = ["-r", "fast", "--epochs", "9999", "--precision", "fp32"]
    child = subprocess.Popen(
        [sys.executable, "-m", "gammabeta", "train", str(digits_file), "-o", str(run), *settings],
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


def test_a_closed_pipe_ends_the_output_and_not_the_training(digits_file: Path, tmp_path: Path) -> None:
    settings = ["--epochs", "6", "--set", "evaluate=epoch", "--precision", "fp32", "--device", "cpu"]
    child = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "gammabeta",
            "train",
            str(digits_file),
            "-o",
            str(tmp_path / "run"),
            *settings,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )
    assert child.stdout is not None
    assert child.stderr is not None
    try:
        child.stdout.readline()
        child.stdout.close()
        errors = child.stderr.read()
        assert (child.wait(timeout=60), errors) == (0, b"")
    finally:
        child.kill()
        child.stderr.close()
    assert Run.open(tmp_path / "run").info.status == "finished"


def test_a_signal_that_was_ignored_is_ignored_still() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stop_on_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested()
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_where_there_is_no_bar_lines_come_at_growing_intervals() -> None:
    assert [line_due(printed) for printed in range(7)] == [5, 10, 20, 40, 60, 120, 180]
    text = io.StringIO()
    reporter = Reporter(Console(file=text, soft_wrap=True), quiet=False)
    for second in range(1, 200):
        step = Standing(second, 400, second // 100, 64 * second, 0.5, 0.25, 0.1)
        reporter.progressed(step, float(second))
    lines = text.getvalue().splitlines()
    assert len(lines) == 7
    assert lines[0] == ("Epoch 0, step 5 of 400: loss 0.5000, accuracy 0.2500, 64 images/s, 395 s left")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "29512"}, "MASTER_ADDR is not set"),
        ({"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}, "MASTER_PORT is not set"),
        ({"RANK": "0"}, "LOCAL_RANK is not set"),
        ({"RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29512"}, "RANK is 2"),
        ({"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"}, "99999"),
        (
            {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"},
            "MASTER_PORT is 'x'",
        ),
    ],
)
def test_an_environment_that_names_no_meeting_place(
    gammabeta: Call,
    digits_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: dict[str, str],
    words: str,
) -> None:
    for name, value in (setting | {"WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    code, _, err = gammabeta("train", digits_file, "-r", "fast", "-o", tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1)
    assert words in err


def test_a_divergence_is_one_line_and_exit_code_2(gammabeta: Call, digits_file: Path, tmp_path: Path) -> None:
    settings = ["--no-batch-norm", "--learning-rate", "1e4", "--precision", "fp32", "--epochs", 3]
    code, out, err = gammabeta(
        "train", digits_file, "-r", "fast", "-o", tmp_path / "run", *settings, "--json"
    )
    assert (code, out) == (2, "")
    errors = [line for line in err.splitlines() if line.startswith("gammabeta: ")]
    assert len(errors) == 1
    assert "the training diverged: the loss of step" in errors[0]
    assert "learning rate of" in errors[0]
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_more_epochs_and_a_warm_start(gammabeta: Call, digits_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert gammabeta("train", digits_file, "-r", "fast", "-o", run, "--precision", "fp32", "-q")[0] == 0
    code, _, err = gammabeta("train", "--resume", run)
    assert code == 2
    assert "--epochs N trains it further" in err
    code, out, _ = gammabeta("train", "--resume", run, "--epochs", 2, "--json")
    assert code == 0
    assert json.loads(out)["steps"] == 10
    assert "schedule is stretched" in gammabeta("train", "--resume", run, "--epochs", 3)[1]
    code, out, _ = gammabeta(
        "train", digits_file, "-r", "fast", "-o", tmp_path / "warm", "--init", run, "--epochs", 1
    )
    assert code == 0
    assert f"Beginning with the weights of {run}" in out
    for wrong in (["--init", run], ["--batch-size", 3]):
        code, _, err = gammabeta("train", "--resume", run, *wrong)
        assert code == 2
        assert "give it alone, or with --epochs" in err


def test_notes_are_lines_on_standard_error(gammabeta: Call, digits_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert gammabeta("train", digits_file, "-r", "fast", "-o", run, "-q")[0] == 0
    document = json.loads((run / "run.json").read_text("utf-8"))
    (run / "run.json").write_text(json.dumps(document | {"[bold]colour": 1}), "utf-8")
    for _ in range(2):
        code, out, err = gammabeta("evaluate", run, "--json")
        assert code == 0
        assert json.loads(out)["count"] == 200
        assert err.count("gammabeta: note: ") == err.count("\n") == 1
        assert "does not know and ignores: [bold]colour" in err
