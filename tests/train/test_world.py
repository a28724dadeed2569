"""Two processes train as one: steps, evaluation, recalibration; and what torchrun does with the command."""

import datetime
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gammabeta import data
from gammabeta.cli.app import run as command_line
from gammabeta.conversion.convert import convert
from gammabeta.data import Dataset, Split
from gammabeta.errors import UsageError
from gammabeta.train import Run, build_network, fit, load_recipe
from gammabeta.train.batches import DeviceImages, Scaling
from gammabeta.train.evaluate import evaluate
from gammabeta.train.fitting import Observer, TrainingInterrupted
from gammabeta.train.loop import Training
from gammabeta.train.provenance import torchrun_job
from gammabeta.train.run import Job
from gammabeta.train.session import begun_before
from gammabeta.train.world import ALONE, World

RECIPES = {
    "sum": {"batch_size": 64},
    "mean": {
        "loss": "mean",
        "label_smoothing": 0.1,
        "learning_rate": 0.05,
        "batch_size": 63,
        "weight_decay": 0.01,
    },
    "augmented": {"shift": 2, "flip": True, "running_statistics": "exponential", "batch_size": 33},
    "starved": {"batch_size": 3},
    "without": {"batch_norm": False, "learning_rate": 0.001},
}


def _digits() -> Dataset:
    full = data.load("mnist")
    train = Split(full.train.images[:640].copy(), full.train.labels[:640].copy())
    test = Split(full.test.images[:700].copy(), full.test.labels[:700].copy())
    return Dataset("digits", train, test, full.classes)


class _Wide(torch.nn.Module):
    """A network in float64, so that what differs is not a convolution's rounding."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x.double())


def _one_step(world: World, name: str, digits: Dataset) -> dict[str, object]:
    recipe = load_recipe("classic", RECIPES[name])
    scaling = Scaling.of(digits.train.images, recipe.pixels)
    cpu = torch.device("cpu")
    images = DeviceImages(digits.train, scaling, cpu, shift=recipe.shift, flip=recipe.flip)
    network = _Wide(build_network(recipe, digits, 3))
    network = convert(network, to="sync" if world.size > 1 else "fused")
    training = Training(network, images, recipe, 3, "fp32", world)
    training.advance(1)
    gradients = [p.grad.clone() for p in network.parameters()]
    progress = training.progress()
    return {
        "state": network.state_dict(),
        "gradients": gradients,
        "figures": (progress.loss, progress.accuracy),
    }


class _Stopper(Observer):
    def __init__(self, rank: int) -> None:
        self.rank, self.steps = rank, 0

    def progressed(self, progress, seconds) -> None:
        self.steps = progress.step

    def stop_requested(self) -> bool:
        return self.rank == 1 and self.steps >= 3  # only this rank was asked to


def _all_cases(world: World, digits: Dataset) -> dict[str, object]:
    results: dict[str, object] = {name: _one_step(world, name, digits) for name in RECIPES}
    recipe = load_recipe("classic", {"batch_size": 64, "recalibrate": 640, "epochs": 0.2})
    network = build_network(recipe, digits, 4)
    outcome = fit(network, digits, recipe, device="cpu", seed=4, world=world)
    results["fit"] = {"state": outcome.model.state_dict(), "figures": (outcome.test.loss, outcome.train.loss)}
    results["counts"] = (outcome.test.count, outcome.test.confusion.sum().item(), outcome.progress.step)
    test = DeviceImages(digits.test, outcome.scaling, torch.device("cpu"))
    torch.manual_seed(0)
    fixed = build_network(recipe, digits, 5)
    found = evaluate(fixed, test, 10, world=world)
    results["evaluate"] = (found.confusion, found.loss)
    return results


def _worker(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=90)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=patience
    )
    world, digits = World(rank, 2, rank), _digits()
    results = _all_cases(world, digits)
    stopper = _Stopper(rank)
    recipe = load_recipe("classic", {"batch_size": 16})
    try:
        fit(build_network(recipe, digits, 4), digits, recipe, device="cpu", observer=stopper, world=world)
    except TrainingInterrupted as stopped:
        results["stopped"] = stopped.progress.step
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone() -> dict:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield _all_cases(ALONE, _digits())
    torch.set_num_threads(threads)


def _error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_of_two_processes_is_the_step_of_one(ranks, alone, name):
    for results in ranks:
        got, want = results[name], alone[name]
        for key, tensor in want["state"].items():
            assert _error(got["state"][key], tensor) <= 1e-6, key
        # A bias before batch normalization has the gradient 0, and what rounding leaves of it.
        floor = 1e-9 * max(theirs.norm() for theirs in want["gradients"])
        for ours, theirs in zip(got["gradients"], want["gradients"], strict=True):
            assert (ours - theirs).norm() <= 1e-6 * theirs.norm() + floor
        assert got["figures"] == pytest.approx(want["figures"], rel=1e-6)


def test_ranks_stay_identical_to_the_bit(ranks):
    for name in (*RECIPES, "fit"):
        first, second = (results[name]["state"] for results in ranks)
        assert all(torch.equal(first[key], second[key]) for key in first), name


def test_fit_shares_evaluation_and_recalibration(ranks, alone):
    for results in ranks:
        assert results["counts"] == alone["counts"]
        # Two steps and a recalibration by the weights they gave.
        assert results["fit"]["figures"] == pytest.approx(alone["fit"]["figures"], rel=1e-4)
        torch.testing.assert_close(results["fit"]["state"], alone["fit"]["state"], rtol=1e-3, atol=1e-5)


def test_evaluation_is_exact(ranks, alone):
    for results in ranks:
        assert torch.equal(results["evaluate"][0], alone["evaluate"][0])
        assert results["evaluate"][1] == pytest.approx(alone["evaluate"][1], rel=1e-13)


def test_all_stop_after_the_same_step_when_one_is_asked_to(ranks):
    assert ranks[0]["stopped"] == ranks[1]["stopped"] >= 3


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 6, 64, 100])
def test_parts_cover_everything_once(count, size):
    parts = [list(range(count))[World(rank, size).part(count)] for rank in range(size)]
    assert list(chain.from_iterable(parts)) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_devices_of_ranks():
    with pytest.raises(UsageError, match="cannot share device 'cuda:1'"):
        World(0, 2).device("cuda:1")
    assert World(1, 2, 1).device("cuda") == "cuda:1"
    assert World(1, 2, 1).device("cpu") == "cpu"
    assert ALONE.device("cuda:1") == "cuda:1"


def test_only_a_restart_of_the_same_job_goes_on(monkeypatch, tmp_path):
    recipe = load_recipe("classic")
    network = {
        "channels": 1,
        "height": 28,
        "width": 28,
        "classes": ["a", "b"],
        "pixel_mean": [0],
        "pixel_scale": [1],
    }
    info = {"seed": 0, "device": "cpu", "precision": "fp32", "data": "mnist", "network": network}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    run = Run.create(tmp_path / "runs" / "run", info, recipe)
    run.finish("failed")
    monkeypatch.chdir(tmp_path)
    same = Job("mnist", recipe)
    assert begun_before(tmp_path / "runs" / "run", same) == tmp_path / "runs" / "run"
    assert begun_before(None, same) == Path("runs/run")
    assert begun_before(tmp_path / "nowhere", same) is None
    for other in ({"recipe": load_recipe("fast")}, {"source": "kmnist"}, {"seed": 1}, {"holdout": 9}):
        assert begun_before(None, replace(same, **other)) is None
    monkeypatch.setattr(os, "getppid", lambda: 1)  # another torchrun on this machine
    assert begun_before(None, same) is None
    monkeypatch.undo()
    assert torchrun_job() is None
    assert begun_before(tmp_path / "runs" / "run", same) is None


# --- torchrun ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    digits = _digits()
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(
        path,
        x_train=digits.train.images[:, 0],
        y_train=digits.train.labels,
        x_test=digits.test.images[:200, 0],
        y_test=digits.test.labels[:200],
    )
    return path


class _Torchrun:
    """torchrun with two workers on this machine."""

    def __init__(self, *arguments: object, restarts: int = 0) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            f"--master-port={port}",
        ]
        command += [f"--max-restarts={restarts}", "--monitor-interval=0.1", "-m", "gammabeta", "train"]
        self.process = subprocess.Popen(
            [*command, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def workers(self) -> dict[int, int]:
        """Process numbers by rank."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid:
                    names = (folder / "environ").read_bytes().split(b"\0")
                    ranks = [int(n[5:]) for n in names if n.startswith(b"RANK=")]
                    found |= {rank: int(folder.name) for rank in ranks}
            except OSError:
                continue
        return found


@contextmanager
def _torchrun(*arguments: object, restarts: int = 0) -> Iterator[_Torchrun]:
    started = _Torchrun(*arguments, restarts=restarts)
    try:
        yield started
    finally:
        for pid in started.workers().values():
            os.kill(pid, signal.SIGKILL)
        started.process.kill()
        started.process.communicate()


def _wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def _settings(digits_file: Path, run: Path, epochs: int) -> list[object]:
    return [digits_file, "-r", "classic", "--epochs", epochs, "--precision", "fp32", "-o", run,
            "--checkpoint-every", 0, "--json"]  # fmt: skip


DIVERGING = ["-r", "fast", "--no-batch-norm", "--learning-rate", "1e4", "--epochs", 3]

linux = pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the workers in /proc")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_killing_a_rank_in_mid_epoch_does_not_stop_the_run(digits_file, tmp_path, victim):
    run = tmp_path / "run"
    with _torchrun(*_settings(digits_file, run, 6), restarts=1) as job:
        _wait_for(lambda: len(list(run.glob("checkpoints/step-*.json"))) == 2)
        os.kill(job.workers()[victim], signal.SIGKILL)
        out, err = job.process.communicate(timeout=150)
    assert job.process.returncode == 0, err
    result = json.loads(out)
    assert (result["steps"], result["images"]) == (60, 6 * 640)
    assert "oing on from step" in err
    steps = [row["step"] for row in Run.open(run).metrics() if row["kind"] == "progress"]
    assert steps == sorted(set(steps))  # one writer, nothing twice, nothing lost
    undisturbed = tmp_path / "undisturbed"
    with _torchrun(*_settings(digits_file, undisturbed, 6)) as job:
        _, err = job.process.communicate(timeout=150)
    assert job.process.returncode == 0, err
    assert (run / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


@linux
@pytest.mark.slow
def test_a_signal_stops_all_ranks_and_the_run_can_be_resumed(digits_file, tmp_path):
    run = tmp_path / "run"
    with _torchrun(*_settings(digits_file, run, 30)) as job:
        _wait_for(lambda: len(list(run.glob("checkpoints/step-*.json"))) == 2)
        job.process.terminate()
        _, err = job.process.communicate(timeout=60)
    assert err.count("Interrupted. Go on with: gammabeta train --resume") == 1
    assert Run.open(run).info.status == "interrupted"
    assert command_line(["train", "--resume", str(run), "--quiet"]) == 0  # with one process instead of two
    assert Run.open(run).info.result["steps"] == 300


@linux
@pytest.mark.slow
def test_an_error_on_one_rank_ends_all_with_one_line(digits_file, tmp_path):
    (tmp_path / "taken").mkdir()
    shutil.copy(digits_file, tmp_path / "taken")
    settings = _settings(digits_file, tmp_path / "run", 1)
    for arguments, words in (
        (_settings(digits_file, tmp_path / "taken", 1), "is there already"),
        ([*settings, "--set", "colour=red"], "unknown recipe field 'colour'"),
        ([*settings, "--device", "tpu"], "'tpu'"),
        ([*settings, *DIVERGING], "the training diverged"),
    ):
        with _torchrun(*arguments) as job:
            out, err = job.process.communicate(timeout=90)
        told = [line for line in err.splitlines() if line.startswith("gammabeta: error:")]
        assert job.process.returncode != 0
        assert out == ""
        assert len(told) == 1, err
        assert words in told[0]
        assert "gammabeta/cli" not in err  # no traceback of ours
