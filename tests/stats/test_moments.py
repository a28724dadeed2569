"""Pooled moments do not depend on how the data was split, shifted or scaled, nor on the order of pooling."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gammabeta.stats.moments import Moments, batch_moments


def pooled(parts) -> Moments:
    moments = Moments.empty(parts[0].shape[1])
    for part in parts:
        moments.pool(batch_moments(part).whole)
    return moments


@settings(deadline=None, max_examples=60)
@given(
    cuts=st.lists(st.integers(0, 30), max_size=6),
    positions=st.sampled_from([(), (1,), (7,), (3, 5)]),
    shift=st.floats(-1e4, 1e4),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 1000),
)
def test_any_split_shift_and_scale(cuts, positions, shift, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30, 3, *positions, dtype=torch.float64, generator=generator) * scale + shift
    edges = [0, *sorted(cuts), 30]
    parts = [x[a:b] for a, b in pairwise(edges)]  # empty parts among them
    dims = [0, *range(2, x.dim())]
    for order in (parts, parts[::-1]):
        moments = pooled(order)
        assert moments.count == x.numel() // 3
        # 1e-11 of the spread, and what rounding the input about a distant mean costs anybody.
        floor = 1e-15 * abs(shift) * abs(shift)
        torch.testing.assert_close(moments.mean, x.mean(dims), rtol=1e-12, atol=1e-12 * scale)
        torch.testing.assert_close(moments.variance, x.var(dims, correction=0), rtol=1e-11, atol=floor)
        torch.testing.assert_close(moments.unbiased_variance, x.var(dims), rtol=1e-11, atol=floor)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_means_of_single_images(memory_format):
    x = (torch.randn(6, 4, 9, 11) + 1e4).contiguous(memory_format=memory_format)
    found = batch_moments(x).image_means
    torch.testing.assert_close(found, x.double().mean((2, 3)), rtol=1e-10, atol=0)


def test_nothing_pools_to_nothing():
    moments = pooled([torch.zeros(0, 5, 3), torch.zeros(4, 5, 0)])
    assert moments.count == 0
    assert torch.equal(moments.variance, torch.zeros(5, dtype=torch.float64))


def test_a_poisoned_value_shows():
    x = torch.randn(8, 2, 3)
    x[4, 1, 2] = float("nan")
    moments = batch_moments(x).whole
    assert moments.mean[0].isfinite()
    assert moments.mean[1].isnan()
