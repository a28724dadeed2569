"""Blocks for large outputs: never shared by two tensors that live, used again by those that come later."""

import copy
import gc
import os
import threading

import pytest
import torch

from gammabeta.kernels.cpu import allocator

LARGE = (allocator._LARGE // 4, 1)


@pytest.fixture(autouse=True)
def pool(monkeypatch):
    """A pool of its own for every test."""
    fresh = allocator._Pool()
    monkeypatch.setattr(allocator, "_pool", fresh)
    yield fresh
    gc.collect()


def large(rows: int = LARGE[0], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return allocator.empty_like(torch.empty(rows, 1, dtype=dtype))


def test_a_block_is_used_again_once_its_tensor_is_gone():
    one, other = large(), large()
    assert one.data_ptr() != other.data_ptr()
    address = one.data_ptr()
    del one
    assert large().data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_shape_strides_and_dtype_are_those_of_empty_like(dtype, form):
    x = torch.empty(4, 32, 96, 96, dtype=dtype).contiguous(memory_format=form)
    made = allocator.empty_like(x)
    assert (made.shape, made.stride(), made.dtype) == (x.shape, x.stride(), dtype)
    assert made.is_contiguous(memory_format=form)
    assert not made._is_view()
    assert made.data_ptr() % 64 == 0
    assert torch.equal(made.fill_(3), torch.full_like(x, 3))


def test_a_view_keeps_the_block():
    made = large().fill_(7)
    view = made.view(-1)[-5:]
    del made
    large().zero_()
    assert view.eq(7).all()


def test_what_a_graph_has_saved_keeps_the_block():
    x = torch.ones(LARGE, requires_grad=True)
    made = large().fill_(3)
    out = (x * made).sum()
    del made
    large().zero_()
    out.backward()
    assert x.grad.eq(3).all()


def test_small_ones_come_from_torch(pool):
    allocator.empty_like(torch.empty(16))
    assert pool.lent_bytes == 0


def test_a_block_a_little_larger_serves(pool):
    block = large(LARGE[0] + 4096)
    address = block.data_ptr()
    del block
    assert large().data_ptr() == address


def test_idle_memory_is_bounded_and_can_be_released(pool):
    for rows in range(LARGE[0], 3 * LARGE[0], LARGE[0] // 4):
        large(rows)
        pool._sort_in()
        assert pool.idle_bytes <= allocator._KEPT * pool.most_lent
    assert pool.idle_bytes > 0
    allocator.release()
    assert pool.idle_bytes == 0
    assert not pool.idle


def test_copies_and_other_processes_get_memory_of_their_own():
    made = large().fill_(2)
    other = copy.deepcopy(made)
    assert other.data_ptr() != made.data_ptr()
    address = made.data_ptr()
    made.share_memory_()
    del other
    assert made.eq(2).all()
    assert made.data_ptr() != address


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_copies():
    held, idle = large().fill_(1), large().fill_(1)
    del idle
    child = os.fork()
    if child == 0:
        held.numpy()[:] = 5
        large().numpy()[:] = 5
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert held.eq(1).all()


def test_threads_never_get_the_same_block():
    wrong = []

    def work(value: int) -> None:
        for _ in range(40):
            made = large().fill_(value)
            if not made.eq(value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
