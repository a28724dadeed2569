"""Suite ``pictures``: folders of pictures trained by ``gammabeta train FOLDER`` alone, and by others.

Shapes are drawn by `harness.shapes`; Fashion-MNIST and emoji are read by `harness.picture_sets`, where their
files are given. Beside shapes trains a plain loop: a small residual network of ``torch.nn`` layers, AdamW,
one cycle, mirror images, on the pictures that `gammabeta.data` reads. Beside the two public sets train Keras'
and timm's own beginner scripts, where ``--peers`` names a folder with their packages. Every row is a process
of its own; seconds are those of the whole command, from its start.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..harness import Options, Result, command
from ..harness.picture_sets import SIDES, write_emoji, write_fashion
from ..harness.shapes import write_shapes

EACH = {"shapes": 260, "fashion-mnist": 200, "emoji": 150}  # pictures, or emoji, of a class
_QUICK = {"shapes": 20, "fashion-mnist": 20, "emoji": 10}
_EPOCHS = {
    "keras": 10,
    "timm": 20,
}  # the guide of Keras has 25, timm 300: so many end in the time of a benchmark
_TITLES = {"keras": "Keras, image classification from scratch", "timm": "timm, ResNet-18"}
_TIMEOUT = 1800.0  # seconds of one training
_SCRIPTS = Path(__file__).parents[1] / "peers"

Row = dict[str, Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the suite's options."""
    parser.add_argument("--fashion", type=Path, metavar="FOLDER", help="IDX files of Fashion-MNIST")
    parser.add_argument("--emoji", type=Path, metavar="FOLDER", help="unpacked npm packages google, twitter")
    parser.add_argument(
        "--peers", type=Path, metavar="FOLDER", help="packages: keras, grain, timm, torchvision"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="%(default)s")
    parser.add_argument("--alone", action="store_true", help="nobody beside us")
    parser.add_argument("--no-shapes", action="store_true", help="the public sets only")


def run(options: Options) -> Result:
    """Train every set with every seed; ``--quick`` takes few pictures and one seed."""
    rows: list[Row] = []
    with TemporaryDirectory(prefix="gammabeta-bench-") as name:
        folders = _folders(options, Path(name))
        for seed in range(1 if options.quick else options.given.seeds):
            for task, folder in folders.items():
                for row in _rows(options, task, folder, seed):
                    rows.append(row)
                    print(row, flush=True)
                    options.save(_result(rows))
    return _result(rows)


def _folders(options: Options, place: Path) -> dict[str, Path]:
    given, each = options.given, _QUICK if options.quick else EACH
    found = {} if given.no_shapes else {"shapes": write_shapes(place / "shapes", each["shapes"])}
    if given.fashion is not None:
        found["fashion-mnist"] = write_fashion(given.fashion, place / "fashion", each["fashion-mnist"])
    if given.emoji is not None:
        found["emoji"] = write_emoji(given.emoji, place / "emoji", each["emoji"])
    return found


def _rows(options: Options, task: str, folder: Path, seed: int) -> list[Row]:
    """Everyone's training of a set, one after the other."""
    rows = [{"task": task, "trainer": "gammabeta train", **_ours(folder, seed)}]
    if options.given.alone:
        return rows
    if task not in SIDES:
        plain = _script("train_pictures.py", [str(folder), str(seed)], {})
        return [*rows, {"task": task, "trainer": "plain PyTorch", "seed": seed, **plain}]
    for peer in _EPOCHS if options.given.peers is not None else ():
        epochs = 2 if options.quick else _EPOCHS[peer]
        paths = os.pathsep.join([str(options.given.peers), os.environ.get("PYTHONPATH", "")])
        arguments = [str(folder), *map(str, (SIDES[task], epochs, seed))]
        found = _script(
            f"train_pictures_{peer}.py", arguments, {"PYTHONPATH": paths, "KERAS_BACKEND": "torch"}
        )
        rows.append({"task": task, "trainer": _TITLES[peer], "seed": seed, **found})
    return rows


def _ours(folder: Path, seed: int) -> Row:
    with TemporaryDirectory(prefix="gammabeta-bench-") as out:
        done = command.train([str(folder), "--seed", str(seed), "--out", f"{out}/run"], _TIMEOUT)
    result = done.result
    found = {"seed": seed, "accuracy": result["test_accuracy"], "epochs": result["passes"]}
    return found | {"train_seconds": result["seconds"]["train"], "seconds": round(done.seconds, 2)}


def _script(name: str, arguments: list[str], variables: dict[str, str]) -> Row:
    """Run a training of somebody else, which prints its figures as JSON on the last line."""
    clock = time.perf_counter()
    line = [sys.executable, "-W", "ignore", str(_SCRIPTS / name), *arguments]
    environment = {**os.environ, **variables}
    done = subprocess.run(
        line, check=True, stdout=subprocess.PIPE, text=True, timeout=_TIMEOUT, env=environment
    )
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return {**found, "seconds": round(time.perf_counter() - clock, 2)}


def _result(rows: list[Row]) -> Result:
    summary = {}
    for task, trainer in dict.fromkeys((row["task"], row["trainer"]) for row in rows):
        own = [row for row in rows if (row["task"], row["trainer"]) == (task, trainer)]
        accuracy, seconds = (statistics.median(row[key] for row in own) for key in ("accuracy", "seconds"))
        summary[f"{task}, {trainer}"] = f"{accuracy:.4f} in {seconds:.1f} s, median of {len(own)}"
    return Result("Pictures in folders", rows, summary=summary)
