"""A smaller number of the kills that scripts/kill_and_resume.py carries out."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_and_resume.py"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(kills: int) -> None:
    options = ["--kills", str(kills), "--seed", "1", "--images", "640", "--epochs", str(20 * kills)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bitwise equal" in done.stdout
