"""Statistics that differ between processes: seen by all of them at the same steps, or by none."""

import datetime
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gammabeta as gb
from gammabeta.errors import UsageError
from gammabeta.guard import Guard, ranks, watch
from gammabeta.guard.reading import Reading

STEPS = 52
ROOM = sys.modules["gammabeta.guard.watch"]  # the function has the name of its module
WAYS = ("apart", "broadcast", "converted", "NaN on one rank", "held", "unwatched")


def reading(*means: float, var: float = 4.0) -> Reading:
    mean = torch.tensor(means).double()
    return Reading(17, (17, 17), (True, True), (mean, mean * 0), (mean * 0 + var, mean * 0 + 1))


def test_any_bit_and_how_far():
    assert not list(ranks.apart([reading(0.5), reading(0.5)], ["a", "b"]))
    assert not list(ranks.apart([reading(float("nan"))] * 2, ["a", "b"]))
    (found,) = ranks.apart([reading(0.5, 1.0), reading(0.5, 3.0), reading(0.5, 2.0)], ["a", "b"])
    assert (found.check, found.layer, found.severity) == ("rank-divergence", "a", "warning")
    assert found.values == {"shift": 1.0, "factor": 1.0}  # two apart, of a standard deviation of two
    (found,) = ranks.apart([reading(0.5), reading(0.5, var=8.0)], ["a", "b"])
    assert found.values == {"shift": 0.0, "factor": 2.0}
    assert list(ranks.apart([reading(0.5), reading(float("nan"))], ["a", "b"]))


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_the_steps_at_which_ranks_meet_depend_on_nothing_that_one_rank_sees(monkeypatch, value):
    met: list[int] = []

    def gathered(layers, step):
        met.append(step)
        return [ranks.read(layers, step)] * 2

    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(ROOM, "gather", gathered)
    model = model_of()
    with watch(model, tell=lambda _: None, ranks=True) as guard, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(140):
            model(torch.full((32, 6), value if step > 10 else 1.0) + torch.randn(32, 6))
            guard.step()
    assert met == [17, 49, 128]


def test_held_batches_on_one_of_several_ranks_would_wait_for_ever(monkeypatch):
    monkeypatch.setattr(ROOM, "world", lambda: 2)
    with pytest.raises(UsageError, match="ranks=True"):
        watch(model_of(), held=[torch.randn(4, 6)])


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=wait
    )
    found = {}
    for way in WAYS:
        inner = model_of()
        if way == "converted":
            inner = gb.convert(inner, to="sync")
        model = DistributedDataParallel(inner, broadcast_buffers=way == "broadcast")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        torch.manual_seed(10 + rank)
        data = [(torch.randn(32, 6) + rank, torch.randint(3, (32,))) for _ in range(STEPS)]
        guard = None
        if way != "unwatched":
            held = data[:2] if way == "held" else None
            options = {"held": held, "loss": F.cross_entropy, "ranks": True}
            guard = watch(model, optimizer, tell=lambda _: None, **options)
        for step, (x, y) in enumerate(data):
            bad = way == "NaN on one rank" and rank and step == 40
            optimizer.zero_grad()
            F.cross_entropy(model(x * float("nan") if bad else x), y).backward()
            optimizer.step()
        told = guard.noticed if isinstance(guard, Guard) else []
        found[way] = [(n.step, n.finding.check) for n in told], inner.state_dict()
    torch.save(found, Path(folder) / f"found{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"found{rank}.pt", weights_only=True)
        assert found["apart"][0] == found["held"][0] == [(17, "rank-divergence")]
        assert not found["broadcast"][0]
        assert not found["converted"][0]
        assert (17, "rank-divergence") in found["NaN on one rank"][0]
        plain = found["unwatched"][1]
        for way in ("apart", "held"):
            assert all(torch.equal(found[way][1][name], plain[name]) for name in plain), way
