"""Ranks pool their exact moments, end identical, and fail together."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import gammabeta as gb


def _data() -> torch.Tensor:
    return torch.randn(23, 3, 4, 4, generator=torch.Generator().manual_seed(5)) * 2 + 100


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))


def _worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    shares = [_data()[:20].split(8), _data()[20:].split(3)]
    for mode in ("joint", "in-order"):
        model = gb.recalibrate(_model(), shares[rank], mode=mode)
        torch.save(model.state_dict(), f"{folder}/{mode}{rank}.pt")
    model = gb.recalibrate(_model(), [_data()] if rank else [], mode="in-order")
    torch.save(model.state_dict(), f"{folder}/empty{rank}.pt")

    def broken():
        yield _data()
        if rank:
            raise OSError("disk gone")

    model = _model()
    try:
        gb.recalibrate(model, broken())
    except Exception as error:
        Path(f"{folder}/error{rank}").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
    torch.save(model.state_dict(), f"{folder}/failed{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    mp.spawn(_worker, (str(path),), nprocs=2)
    return path


@pytest.mark.parametrize("run", ["joint", "in-order", "empty"])
def test_ranks_end_identical(folder, run):
    first, second = (torch.load(folder / f"{run}{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("run", ["joint", "in-order"])
def test_uneven_ranks_equal_one_process(folder, run):
    state = torch.load(folder / f"{run}0.pt", weights_only=True)
    x = _data().double()
    torch.testing.assert_close(state["0.running_mean"].double(), x.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(state["0.running_var"].double(), x.var((0, 2, 3)), rtol=1e-6, atol=0)
    if run == "in-order":
        alone = gb.recalibrate(_model(), [_data()], mode="in-order").state_dict()
        torch.testing.assert_close(state["2.running_var"], alone["2.running_var"], rtol=1e-5, atol=0)


def test_a_failing_rank_leaves_every_rank_as_it_was(folder):
    assert (folder / "error1").read_text() == "OSError: disk gone"
    assert (folder / "error0").read_text().startswith("SurgeryError: rank 1 failed")
    untouched = _model().state_dict()
    for rank in (0, 1):
        state = torch.load(folder / f"failed{rank}.pt", weights_only=True)
        assert all(torch.equal(state[key], untouched[key]) for key in untouched)
