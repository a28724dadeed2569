"""Kill a training with SIGKILL at random moments, resume it each time, and compare the weights bit for bit.

    python scripts/kill_and_resume.py --kills 30 --seed 0          # the result is in docs/recovery.md
    python scripts/kill_and_resume.py --full-disk FOLDER           # FOLDER: a small file system of its own

Checkpoints are written as often as can be, so that many of the moments fall into the writing of one.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from gammabeta import data
from gammabeta.train import Run
from gammabeta.train.checkpoint import Checkpoints

TRAIN = [sys.executable, "-m", "gammabeta", "train"]


def write_digits(path: Path, count: int) -> Path:
    """Write the first digits of MNIST as an NPZ data set."""
    full = data.load("mnist")
    np.savez(
        path,
        x_train=full.train.images[:count, 0],
        y_train=full.train.labels[:count],
        x_test=full.test.images[:500, 0],
        y_test=full.test.labels[:500],
    )
    return path


def arguments(digits: Path, run: Path, epochs: float) -> list[str]:
    """Return the command line of the training, momentum and augmentation included."""
    settings = ["--epochs", str(epochs), "--precision", "fp32", "--set", "batch_size=64", "--set", "shift=1"]
    often = ["--checkpoint-every", "0", "--device", "cpu", "--quiet"]
    return [*TRAIN, str(digits), "--out", str(run), *settings, *often]


def resume(run: Path) -> list[str]:
    """Return the command line that goes on with a run."""
    return [*TRAIN, "--resume", str(run), "--checkpoint-every", "0", "--quiet"]


def newest_step(run: Path) -> int:
    """Return the step of the newest undamaged checkpoint, 0 if there is none."""
    state, _ = Checkpoints(run).load()
    return int(state.values["step"]) if state else 0


def kill_after(command: list[str], run: Path, seconds: float, *, training: bool) -> bool:
    """Start a command and kill it some seconds after its start, or its first checkpoint if ``training``.

    Returns:
        Whether it was still running.
    """
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    before = checkpoint_names(run)
    while training and child.poll() is None and checkpoint_names(run) == before:
        time.sleep(0.01)
    try:
        _, errors = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
        child.communicate()
        return True
    if child.returncode != 0:
        raise SystemExit(f"the training failed: {errors}")
    return False


def checkpoint_names(run: Path) -> list[str]:
    """Return the names of the files among the checkpoints."""
    folder = run / "checkpoints"
    return sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []


def kill_many(kills: int, seed: int, count: int, epochs: float) -> None:
    """Carry out the experiment and print a line for each kill and one for the result."""
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        digits = write_digits(Path(folder) / "digits.npz", count)
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        clock = time.perf_counter()
        subprocess.run(arguments(digits, whole, epochs), check=True, stdout=subprocess.DEVNULL)
        print(f"uninterrupted: {time.perf_counter() - clock:.1f} s", flush=True)

        def command() -> list[str]:
            started = (killed / "run.json").exists()
            return resume(killed) if started else arguments(digits, killed, epochs)

        done, left = 0, ""
        while done < kills:
            training = moments.random() < 0.8  # the others fall into the start of the process
            seconds = moments.uniform(0.0, 1.0 if training else 4.0)
            if not kill_after(command(), killed, seconds, training=training):
                print("finished before the kill: give it more epochs")
                break
            done += 1
            left += "w" if any(name.endswith(".tmp") for name in checkpoint_names(killed)) else "."
            where = "after a checkpoint" if training else "after its start"
            print(f"kill {done}: {seconds:.2f} s {where}, step kept {newest_step(killed)}", flush=True)
        if Run.open(killed).info.status != "finished":
            subprocess.run(command(), check=True, stdout=subprocess.DEVNULL)
        equal = (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
        print(f"{done} kills, {left.count('w')} of them while a checkpoint was being written")
        print(f"final weights {'bitwise equal' if equal else 'DIFFERENT'}")
        raise SystemExit(0 if equal and done == kills else 1)


def fill_disk(folder: Path, count: int, epochs: float) -> None:
    """Fill the run's file system during a training, free it, resume, and compare the final weights."""
    with tempfile.TemporaryDirectory() as elsewhere:
        digits = write_digits(Path(elsewhere) / "digits.npz", count)
        whole, run = Path(elsewhere) / "whole", folder / "run"
        subprocess.run(arguments(digits, whole, epochs), check=True, stdout=subprocess.DEVNULL)
        child = subprocess.Popen(arguments(digits, run, epochs), stderr=subprocess.PIPE, text=True)
        while newest_step(run) == 0 and child.poll() is None:
            time.sleep(0.05)
        filler = folder / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 4096)
            except OSError:
                pass
        errors = child.communicate()[1]
        print(f"exit code {child.returncode}: {errors.strip()}")
        kept = newest_step(run)
        os.truncate(filler, 0)
        print(f"step kept {kept}; the disk is freed and the run resumed")
        subprocess.run(resume(run), check=True, stdout=subprocess.DEVNULL)
        equal = (whole / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
        print(f"final weights {'bitwise equal' if equal else 'DIFFERENT'}")
        raise SystemExit(0 if equal and child.returncode == 2 and kept else 1)


def main() -> None:
    """Parse the command line and carry out one of the two experiments."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--epochs", type=float, default=40.0)
    parser.add_argument("--full-disk", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    if options.full_disk:
        fill_disk(options.full_disk, options.images, options.epochs)
    kill_many(options.kills, options.seed, options.images, options.epochs)


if __name__ == "__main__":
    main()
