"""Two gloo processes equal one: outputs, gradients, running statistics; uneven and empty shares included.

Two processes are started once for the whole file; each runs every case beside the one-process layer and
writes what it got. The tests read those files.
"""

import copy
import datetime
import inspect
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import gammabeta as gb

SHARES = {"32+32": 32, "40+24": 40, "64+0": 64}
TAILS = {
    "plain": (None, None, False),
    "relu-pool-residual": ("relu", 2, True),
    "residual": ("relu", None, True),
}


def _random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _share(rank: int, cut: int) -> slice:
    return slice(0, cut) if rank == 0 else slice(cut, None)


def _pair(channels: int, **settings) -> tuple[gb.nn.BatchNorm2d, gb.nn.SyncBatchNorm]:
    one, many = gb.nn.BatchNorm2d(channels, **settings), gb.nn.SyncBatchNorm(channels, **settings)
    with torch.no_grad():
        one.weight.copy_(_random(channels, seed=1).abs() + 0.5)
        one.bias.copy_(_random(channels, seed=2))
    many.load_state_dict(one.state_dict())
    return one, many


def _run(layer: nn.Module, x: Tensor, residual: Tensor | None, upstream: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, residual) if t is not None]
    out = layer(*leaves)
    grad = upstream[..., : out.shape[2], : out.shape[3]]
    return [out.detach(), *torch.autograd.grad(out, [*leaves, layer.weight, layer.bias], grad)]


def _equality(rank: int) -> Iterator[tuple[str, object]]:
    for share, cut in SHARES.items():
        for tail, (activation, pool, added) in TAILS.items():
            for layout in (torch.contiguous_format, torch.channels_last):
                for dtype in (torch.float32, torch.float64):
                    one, many = _pair(5, activation=activation, pool=pool, dtype=dtype)
                    x = (_random(64, 5, 7, 6, seed=3, dtype=dtype) * 3 + 1).contiguous(memory_format=layout)
                    residual = _random(64, 5, 7, 6, seed=4, dtype=dtype).contiguous(memory_format=layout)
                    upstream = _random(64, 5, 7, 6, seed=5, dtype=dtype)
                    whole = _run(one, x, residual if added else None, upstream)
                    mine = _share(rank, cut)
                    part = _run(many, x[mine], residual[mine] if added else None, upstream[mine])
                    for grad in part[-2:]:
                        dist.all_reduce(grad)
                    want = [*(t[mine] for t in whole[:-2]), *whole[-2:]]
                    state = [list(layer.state_dict().values()) for layer in (many, one)]
                    name = f"equal/{share}/{tail}/{str(layout)[6:]}/{str(dtype)[6:]}"
                    yield name, (part + state[0], want + state[1])


def _far_from_zero(rank: int) -> Iterator[tuple[str, object]]:
    x = (_random(64, 4, 5, 5, seed=6) * 1e-2 + 1e4).contiguous()
    layer = gb.nn.SyncBatchNorm(4, momentum=1.0, eps=1e-12)
    theirs = nn.BatchNorm2d(4, momentum=1.0, eps=1e-12)
    wide = x.double()
    var, mean = torch.var_mean(wide, (0, 2, 3), keepdim=True, correction=0)
    truth = (wide - mean) * (var + 1e-12).rsqrt()
    whole = theirs(x).detach()
    mine = _share(rank, 40)
    out = layer(x[mine]).detach()
    yield (
        "far",
        (out.double(), whole[mine].double(), truth[mine], layer.running_var, var.flatten() * 1600 / 1599),
    )


def _twice(rank: int) -> Iterator[tuple[str, object]]:
    for share, cut in SHARES.items():
        for activation in (None, "silu"):
            found = []
            for layer, mine in zip(
                _pair(3, activation=activation, dtype=torch.float64),
                (slice(None), _share(rank, cut)),
                strict=True,
            ):
                x = _random(64, 3, 2, 2, seed=7, dtype=torch.float64)[mine].requires_grad_()
                upstream = _random(64, 3, 2, 2, seed=8, dtype=torch.float64)[mine].requires_grad_()
                v = _random(64, 3, 2, 2, seed=9, dtype=torch.float64)[mine]
                (grad,) = torch.autograd.grad(layer(x), x, upstream, create_graph=True)
                second = list(torch.autograd.grad(grad, [x, upstream, layer.weight], v))
                if isinstance(layer, gb.nn.SyncBatchNorm):
                    dist.all_reduce(second[2])
                found.append([grad.detach(), *second])
            want = [*(t[_share(rank, cut)] for t in found[0][:3]), found[0][3]]
            yield f"twice/{share}/{activation}", (found[1], want)


def _step(rank: int) -> Iterator[tuple[str, object]]:
    """Steps under DistributedDataParallel, the loss scaled so that its average is the whole batch's."""
    x, y = _random(64, 2, 8, 8, seed=10, dtype=torch.float64), torch.arange(64) % 3
    for share, cut in SHARES.items():
        torch.manual_seed(0)
        first = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        whole = nn.Sequential(*first, nn.Linear(144, 3), nn.BatchNorm1d(3)).double()
        many = gb.convert(copy.deepcopy(whole), to="sync")
        wrapped = DistributedDataParallel(many)
        mine = _share(rank, cut)
        for network, batch, target, scale in ((whole, x, y, 1 / 64), (wrapped, x[mine], y[mine], 2 / 64)):
            optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
            for _ in range(3):
                optimizer.zero_grad()
                (nn.functional.cross_entropy(network(batch), target, reduction="sum") * scale).backward()
                optimizer.step()
        yield f"step/{share}", (list(many.state_dict().values()), list(whole.state_dict().values()))


def _manners(rank: int) -> Iterator[tuple[str, object]]:
    alone = [dist.new_group([0]), dist.new_group([1])]
    x = _random(8, 3, 4, 4, seed=11 + rank)
    one, many = _pair(3)
    many.process_group = alone[rank]
    yield "group", ([many(x).detach()], [one(x).detach()])
    yield "copied group", copy.deepcopy(many).process_group is alone[rank]
    back = gb.convert(gb.convert(many, to="sync"), to="torch")
    yield "converted group", (type(back) is nn.SyncBatchNorm, back.process_group is alone[rank])

    _, layer = _pair(3)
    before = copy.deepcopy(layer.state_dict())
    bad = x.clone()
    bad[1, 2, 3, 1] = float("inf") if rank else 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer(bad)
    yield "skipped", ([str(w.message) for w in caught], [layer.state_dict(), before])

    one, many = _pair(3, initialize="first_batch")
    one_average, many_average = _pair(3, momentum=None)
    both = torch.cat([_random(8, 3, 4, 4, seed=11 + r) for r in (0, 1)])
    for _ in range(3):
        one(both), many(x), one_average(both), many_average(x)
        both, x = both * 1.5 + 1, x * 1.5 + 1
    states = [
        [*a.state_dict().values(), *b.state_dict().values()]
        for a, b in ((many, many_average), (one, one_average))
    ]
    yield "running", (states[0], states[1])

    _, layer = _pair(3)
    try:
        layer(torch.ones(1 - rank, 3, 1, 1))
        yield "one value", "accepted"
    except ValueError as error:
        yield "one value", str(error)
    yield "two values", layer(torch.full((1, 3, 1, 1), 1.0 + rank)).detach()
    before_it = int(layer.num_batches_tracked)
    shape = tuple(layer(torch.empty(0, 3, 2, 2)).shape)
    yield "none at all", (shape, int(layer.num_batches_tracked) - before_it)
    layer.eval()
    yield "evaluation", layer(x).shape == x.shape if rank else True  # rank 0 does not call it
    frozen = gb.nn.SyncBatchNorm(3, track_running_stats=False).eval()
    yield "no statistics", frozen(x).shape == x.shape if rank else True

    _, layer = _pair(3)
    checkpoint(layer, x.requires_grad_(), use_reentrant=False).square().sum().backward()
    yield "checkpoint", int(layer.num_batches_tracked)
    state = gb.nn.SyncBatchNorm(3, eps=0.0)
    try:
        state(x)
    except ValueError as error:
        yield "eps", str(error)

    model = nn.Sequential(gb.nn.SyncBatchNorm(3), nn.Conv2d(3, 2, 1), gb.nn.SyncBatchNorm(2))
    with torch.no_grad():
        model[1].weight.copy_(_random(2, 3, 1, 1, seed=12))
    gb.recalibrate(model, [_random(8, 3, 4, 4, seed=s) for s in ((13, 14, 15) if rank else ())])
    pooled = torch.cat([_random(8, 3, 4, 4, seed=s) for s in (13, 14, 15)])
    yield "recalibrated", ([model[0].running_var], [pooled.var((0, 2, 3))])


def _worker(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=90)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=patience
    )
    results: dict[str, object] = {}
    for cases in (_equality, _far_from_zero, _twice, _step, _manners):
        results.update(cases(rank))
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_worker, (str(folder),), nprocs=2)
    return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def assert_equal(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for index, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert ours.shape == theirs.shape
        scale = theirs.double().norm()
        error = (ours.double() - theirs.double()).norm()
        assert error <= tolerance * scale, f"tensor {index}: {error / scale:.2e}"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("share", SHARES)
def test_two_processes_equal_one(ranks, share, tail, layout, dtype):
    for results in ranks:
        got, want = results[f"equal/{share}/{tail}/{layout}/{dtype}"]
        assert_equal(got, want, 1e-6 if dtype == "float32" else 1e-14)


@pytest.mark.parametrize("share", SHARES)
def test_running_statistics_are_the_same_bits_on_every_rank(ranks, share):
    got = [results[f"equal/{share}/plain/contiguous_format/float32"][0] for results in ranks]
    assert all(torch.equal(a, b) for a, b in zip(got[0][-3:], got[1][-3:], strict=True))


def test_means_far_from_zero_survive(ranks):
    for results in ranks:
        out, torchs, truth, running_var, var = results["far"]
        # Twice torch's own error, plus half a unit in the last place of the mean, in standard deviations.
        floor = 2.0**-11 / var.sqrt().min()
        assert (out - truth).abs().max() <= 2 * (torchs - truth).abs().max() + floor
        # That half unit enters the variance squared: (2^-11)^2 / 1e-4 = 0.24 %.
        torch.testing.assert_close(running_var.double(), var, rtol=2.5e-3, atol=0)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("share", SHARES)
def test_second_derivatives(ranks, share, activation):
    for results in ranks:
        assert_equal(*results[f"twice/{share}/{activation}"], tolerance=1e-12)


@pytest.mark.parametrize("share", SHARES)
def test_training_steps_under_ddp(ranks, share):
    for results in ranks:
        assert_equal(*results[f"step/{share}"], tolerance=1e-12)


def test_each_process_group_by_itself(ranks):
    for results in ranks:
        assert_equal(*results["group"], tolerance=0)
        assert results["copied group"]
        assert results["converted group"] == (True, True)


def test_a_batch_not_finite_on_one_rank_is_left_out_on_all(ranks):
    for results in ranks:
        words, (after, before) = results["skipped"]
        assert len(words) == 1
        assert words[0].startswith("a batch with non-finite statistics was left out")
        torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_first_batch_and_cumulative_average(ranks):
    for results in ranks:
        assert_equal(*results["running"], tolerance=1e-6)


def test_too_little_to_normalise(ranks):
    for rank, results in enumerate(ranks):
        assert "more than 1 value per channel" in results["one value"]
        torch.testing.assert_close(results["two values"].flatten(), _expected_of_two(rank), rtol=0, atol=1e-4)
        assert results["none at all"] == ((0, 3, 2, 2), 1)
        assert "eps" in results["eps"]


def _expected_of_two(rank: int) -> Tensor:
    weight, bias = _random(3, seed=1).abs() + 0.5, _random(3, seed=2)
    return weight * (2 * rank - 1) + bias


def test_evaluation_waits_for_nobody(ranks):
    assert all(results["evaluation"] and results["no statistics"] for results in ranks)


def test_checkpointing_counts_once(ranks):
    assert [results["checkpoint"] for results in ranks] == [1, 1]


def test_recalibration_of_synchronized_layers(ranks):
    for results in ranks:
        assert_equal(*results["recalibrated"], tolerance=1e-6)


def _compiled(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    layer = gb.nn.SyncBatchNorm(3, activation="relu")
    compiled = torch.compile(nn.Sequential(nn.Conv2d(3, 3, 1), layer, nn.Conv2d(3, 3, 1)), backend="eager")
    x = _random(8, 3, 4, 4, seed=rank)
    found = []
    for network in (compiled, compiled._orig_mod):
        out = network(x)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), network.parameters())])
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)
    assert int(layer.num_batches_tracked) == 2
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_compiled_model_breaks_its_graph_at_the_layer(tmp_path):
    mp.spawn(_compiled, (str(tmp_path),), nprocs=2)


# --- one process ------------------------------------------------------------------------------------------


def test_the_arguments_and_the_text_are_torchs():
    ours = list(inspect.signature(gb.nn.SyncBatchNorm).parameters)
    theirs = list(inspect.signature(nn.SyncBatchNorm).parameters)
    assert ours[: len(theirs)] == theirs
    for settings in ({}, {"affine": False}, {"momentum": None, "eps": 1e-3}, {"track_running_stats": False}):
        layer, torchs = gb.nn.SyncBatchNorm(4, **settings), nn.SyncBatchNorm(4, **settings)
        assert repr(layer) == repr(torchs)
        torchs.load_state_dict(layer.state_dict())
        layer.load_state_dict(torchs.state_dict())
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)


def test_alone_it_is_batch_norm():
    one, many = _pair(3, activation="relu")
    x = _random(8, 3, 4, 4, seed=20)
    torch.testing.assert_close(_run(many, x, None, x), _run(one, x, None, x), rtol=0, atol=0)
    torch.testing.assert_close(many.state_dict(), one.state_dict(), rtol=0, atol=0)
    for shape in ((8, 3), (8, 3, 5), (4, 3, 2, 2, 2)):
        assert many(torch.randn(shape)).shape == shape


@pytest.mark.parametrize("shape", [(3,), (2, 0, 4, 4)])
def test_inputs_torch_refuses(shape):
    messages = []
    for layer in (gb.nn.SyncBatchNorm(3), nn.SyncBatchNorm(3)):
        with pytest.raises(ValueError, match=r"2D input|non-zero") as caught:
            layer(torch.randn(shape))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("make", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_convert_goes_both_ways(make):
    model = nn.Sequential(make(3))
    there = gb.convert(model, to="sync")
    assert type(there[0]) is gb.nn.SyncBatchNorm
    assert there[0].weight is model[0].weight
    back = gb.convert(there, to="torch")
    assert type(back[0]) is make
    assert set(vars(back[0])) == set(vars(model[0]))
    assert repr(back) == repr(model)


def test_convert_gives_a_layer_of_unknown_dimension_torchs_own_kind():
    back = gb.convert(gb.nn.SyncBatchNorm(3), to="torch")
    assert type(back) is nn.SyncBatchNorm
    assert back.process_group is None
    assert back.eval()(torch.ones(2, 3)).shape == (2, 3)
