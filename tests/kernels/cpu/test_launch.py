"""Threads: the same result for the same number of them, whoever asks, before and after a fork."""

import os
import sys
import threading

import pytest
import torch
from torch import Tensor

from gammabeta.epilogue import Epilogue
from gammabeta.kernels.backend import Call, Normalized
from gammabeta.kernels.cpu import host
from gammabeta.kernels.cpu import launch as team

SHAPE = (8, 20, 30, 30)  # large enough for several threads


@pytest.fixture(params=[1, 2, 5])
def several(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def tensors(last: bool) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    form = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(SHAPE).contiguous(memory_format=form)
    return x, torch.randn(SHAPE).contiguous(memory_format=form), torch.randn(SHAPE[1])


def relu_call(x: Tensor, weight: Tensor) -> Call:
    return Call(x, weight, None, None, Epilogue("relu"), 1e-5)


def step(x: Tensor, grad: Tensor, weight: Tensor) -> list[Tensor]:
    call = relu_call(x, weight)
    out, mean, var, invstd = host.forward_train(call)
    dx, dweight, dbias, _ = host.backward(grad, Normalized(call, mean, invstd), False)
    return [out, mean, var, dx, dweight, dbias]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Compared by NumPy: torch's own operators hang in a forked child once its threads have run."""
    return all((p.numpy() == q.numpy()).all() for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("last", [False, True])
def test_same_bits_every_time(several, last):
    given = tensors(last)
    first = step(*given)
    assert all(same(step(*given), first) for _ in range(5))


@pytest.mark.parametrize("last", [False, True])
def test_number_of_threads_changes_no_more_than_a_rounding(several, last):
    given = tensors(last)
    found = step(*given)
    torch.set_num_threads(1)
    for a, b in zip(found, step(*given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_several_python_threads_at_once(several):
    cases = [tensors(last) for last in (False, True)]
    expected = [step(*given) for given in cases]
    wrong = []

    def work() -> None:
        for _ in range(10):
            wrong.extend(i for i, given in enumerate(cases) if not same(step(*given), expected[i]))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_pool_of_python_threads_gives_the_same(monkeypatch, several):
    given = tensors(True)
    expected = step(*given)
    monkeypatch.setattr(team, "_team", lambda: team._python_team)
    assert all(same(step(*given), expected) for _ in range(5))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_child(several):
    cases = [tensors(last) for last in (False, True)]
    expected = [step(*given) for given in cases]
    child = os.fork()
    if child == 0:
        right = all(same(step(*given), expected[i]) for i, given in enumerate(cases))
        os._exit(0 if right and team.describe() == "one thread (a forked child)" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert all(same(step(*given), expected[i]) for i, given in enumerate(cases))


class _Normalised(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return step(*tensors(bool(index)))[0]


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_in_a_loaders_worker():
    expected = [step(*tensors(last))[0] for last in (False, True)]
    loader = torch.utils.data.DataLoader(
        _Normalised(), batch_size=None, num_workers=1, multiprocessing_context="fork"
    )
    for found, wanted in zip(loader, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_inference_mode_and_grad_mode():
    x, _, weight = tensors(False)
    expected = host.forward_train(relu_call(x, weight))[0]
    with torch.inference_mode():
        assert torch.equal(host.forward_train(relu_call(x, weight))[0], expected)
    leaf = x.clone().requires_grad_()
    out = host.forward_train(relu_call(leaf, weight))[0]
    assert torch.equal(out, expected)
    assert not out.requires_grad
