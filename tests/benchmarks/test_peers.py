"""The peers' table, the task they read, the line they print; one real peer, run in this environment."""

import contextlib
import json
import math
import os
import re
import sys

import numpy as np
import pytest

from benchmarks.suites import peers
from gammabeta.data import Dataset, Split
from gammabeta.errors import UnavailableError, UsageError

# A peer without a framework: it trains nothing, so only the contract is tested.
COUNTING = """
import contract, numpy as np
class Trainer:
    def __init__(self, task): self.task, self.warm = task, False
    def warm_up(self): self.warm = True
    def epoch(self):
        assert self.warm
        return np.array([float(len(batch)) for batch in self.task.batches()])
    def accuracy(self, images, labels): return float((labels == labels[0]).mean())
contract.run("counting", Trainer, lambda: {"nothing": "1.0"})
"""


@pytest.fixture
def environments(tmp_path):
    """A folder of environments in which every peer's Python is this one."""
    for name in {peer.environment for peer in peers.read_peers().values()}:
        binaries = tmp_path / "environments" / name / "bin"
        binaries.mkdir(parents=True)
        (binaries / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (binaries / "python").chmod(0o755)
    return tmp_path / "environments"


def peer_of(script, environment="pytorch"):
    return peers.Peer("some", "Some peer", environment, str(script), (), ("fp32",), ())


def test_every_peer_has_a_script_and_pinned_requirements():
    found = peers.read_peers()
    assert {"pytorch-eager", "pytorch-channels-last", "pytorch-compiled"} < set(found)
    assert {"keras", "jax", "tinygrad", "mxnet"} < set(found)
    for peer in found.values():
        assert (peers.FOLDER / peer.script).is_file()
        assert peer.precisions[0] == "fp32"
        lines = (peers.FOLDER / "requirements" / f"{peer.environment}.txt").read_text().splitlines()
        pins = [line for line in lines if not line.startswith("#")]
        assert pins
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), pins


def test_the_task_holds_the_notebooks_parameters_and_each_image_once(tmp_path, digits):
    peers.write_task(tmp_path / "task.npz", digits, seed=3)
    with np.load(tmp_path / "task.npz") as archive:
        task = dict(archive)
    assert task["images"].shape == (1000, 28, 28)
    assert task["images"].dtype == np.uint8
    assert np.array_equal(np.sort(task["order"]), np.arange(1000))
    parameters = {name: task[name] for name in task if "." in name}
    assert sum(value.size for value in parameters.values()) == 129_464
    assert all(value.dtype == np.float32 for value in parameters.values())
    assert abs(task["dense1.weight"].mean()) < 1e-3
    assert abs(task["dense1.weight"].std() - 0.01) < 1e-3
    assert abs(task["bn3.weight"].mean() - 1) < 0.01
    peers.write_task(tmp_path / "again.npz", digits, seed=3)
    with np.load(tmp_path / "again.npz") as again:
        assert all(np.array_equal(again[name], task[name]) for name in task)


def test_a_data_set_that_the_network_or_the_evaluation_does_not_fit_is_refused(tmp_path, digits):
    wide = Split(np.zeros((1000, 1, 28, 30), np.uint8), np.zeros(1000, np.int64))
    with pytest.raises(UsageError, match="28×28"):
        peers.write_task(tmp_path / "t.npz", Dataset("wide", wide, wide, digits.classes), seed=0)
    few = Split(digits.train.images[:999].copy(), digits.train.labels[:999])
    with pytest.raises(UsageError, match="1,000"):
        peers.write_task(tmp_path / "t.npz", Dataset("few", few, digits.test, digits.classes), seed=0)


def test_a_peers_line_keeps_the_contract(tmp_path, digits, environments, monkeypatch):
    (tmp_path / "counting.py").write_text(COUNTING)
    monkeypatch.setenv("PYTHONPATH", str(peers.FOLDER))
    peers.write_task(tmp_path / "task.npz", digits, seed=0)
    with peers.held_to(1):
        result = peers.run_peer(
            peer_of(tmp_path / "counting.py"), environments, tmp_path / "task.npz", "fp32", 60
        )
    assert set(peers.FIELDS) <= set(result)
    assert (result["peer"], result["threads"], result["images"]) == ("counting", 1, 1000)
    assert result["steps"] == math.ceil(1000 / 64)
    expected = 64.0
    for size in [64] * 14 + [1000 % 64]:
        expected = 0.99 * expected + 0.01 * size
    assert result["moving_loss"] == pytest.approx(expected)
    assert 0 < result["test_accuracy"] < 1
    assert result["peak_rss_mb"] > 10
    assert result["versions"]["nothing"] == "1.0"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("", "no result"),
        ("Loading\nnot json", "no result"),
        ("[1, 2]", "no result"),
        (json.dumps({field: 0 for field in peers.FIELDS if field != "moving_loss"}), "lacks moving_loss"),
    ],
)
def test_output_that_breaks_the_contract_is_refused(output, message):
    with pytest.raises(UnavailableError, match=message):
        peers.parse_result(output)


def test_only_the_last_line_counts():
    result = dict.fromkeys(peers.FIELDS, 0)
    assert peers.parse_result(f"compiling {{}}\n{json.dumps(result)}\n") == result


def test_a_missing_environment_names_the_command_that_builds_it(tmp_path):
    with pytest.raises(UnavailableError, match=r"build\.py pytorch --into"):
        peers.interpreter(tmp_path, peer_of("x.py"))


@pytest.mark.parametrize(
    ("code", "timeout", "message"),
    [
        ("raise ValueError('no such layer')", 60, "code 1: ValueError: no such layer"),
        ("import time; time.sleep(60)", 1, "longer than 1 s"),
    ],
)
def test_a_peer_that_fails_says_why(tmp_path, environments, code, timeout, message):
    (tmp_path / "peer.py").write_text(code)
    with pytest.raises(UnavailableError, match=message):
        peers.run_peer(peer_of(tmp_path / "peer.py"), environments, tmp_path / "t.npz", "fp32", timeout)


def test_threads_are_given_back_even_after_an_error():
    before = os.sched_getaffinity(0)
    with contextlib.suppress(RuntimeError), peers.held_to(1):
        held = os.sched_getaffinity(0)
        raise RuntimeError
    assert len(held) == 1
    assert os.sched_getaffinity(0) == before
    with pytest.raises(UsageError, match="processors"), peers.held_to(len(before) + 1):
        pass


def test_channels_last_parameters_compute_the_same(monkeypatch, digits, tmp_path):
    monkeypatch.syspath_prepend(str(peers.FOLDER))
    import contract

    peers.write_task(tmp_path / "task.npz", digits, seed=0)
    monkeypatch.setattr(sys, "argv", ["peer", str(tmp_path / "task.npz")])
    task = contract.parse()
    turned, random = task.initial_channels_last(), np.random.default_rng(1)
    flat = random.normal(size=(3, 50, 4, 4))
    expected = flat.reshape(3, 800) @ task.initial["dense1.weight"].T
    actual = flat.transpose(0, 2, 3, 1).reshape(3, 800) @ turned["dense1.weight"]
    assert np.allclose(actual, expected, atol=1e-12)
    patch = random.normal(size=(20, 5, 5))
    expected = np.einsum("oihw,ihw->o", task.initial["conv2.weight"], patch)
    actual = np.einsum("hwio,hwi->o", turned["conv2.weight"], patch.transpose(1, 2, 0))
    assert np.allclose(actual, expected, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pytorch-eager", "pytorch-channels-last"])
def test_pytorch_trains_here(tmp_path, digits, environments, name):
    peers.write_task(tmp_path / "task.npz", digits, seed=0)
    peer = peers.read_peers()[name]
    with peers.held_to(1):
        result = peers.run_peer(peer, environments, tmp_path / "task.npz", "fp32", 120)
    assert result["steps"] == 16
    assert 0 < result["moving_loss"] < math.log(10) + 0.1
    assert result["train_accuracy"] >= 0.05
