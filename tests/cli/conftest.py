"""Run the command line in this process, on a small real data set."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from gammabeta import data
from gammabeta.cli.app import run


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def gammabeta(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Return a function that runs a command line and tells exit code, output and errors."""

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def digits_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an NPZ of 640 training and 200 test digits."""
    full = data.load("mnist")
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(
        path,
        x_train=full.train.images[:640, 0],
        y_train=full.train.labels[:640],
        x_test=full.test.images[:200, 0],
        y_test=full.test.labels[:200],
    )
    return path


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, digits_file: Path) -> Path:
    """Return a run folder trained for a few steps."""
    path = tmp_path_factory.mktemp("runs") / "run"
    arguments = [
        "train",
        str(digits_file),
        "--recipe",
        "fast",
        "--epochs",
        "4",
        "--out",
        str(path),
        "--quiet",
    ]
    assert run([*arguments, "--precision", "fp32", "--set", "batch_size=64"]) == 0
    return path
