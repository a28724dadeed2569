"""How the work on one tensor is cut: layout, threads, tiles, working memory. Depends on its shape alone."""

import math
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import is_rows

_GRAIN = 16384  # elements below which a further thread costs more than it brings
_SCATTERED = 512  # elements of a plane below which a channel counts as scattered
_TABLES = 48  # bytes of working memory per element of a tile
_TILE = 256  # elements of a tile at least: a sum is in a register again before its turn comes
_STREAMED = 12 << 20  # bytes of an output from which its start has left the caches before its end is written


class Plan(NamedTuple):
    """How one tensor is laid out and its work cut."""

    rows: bool  # channels_last or (N, C)
    channels: int
    threads: int
    image_parts: int
    channel_parts: int
    fused: bool  # one part sees the whole of a channel, so that the backward pass is one kernel
    fused_forward: bool  # and so is the forward pass
    sums_bytes: int
    step: int  # bytes of working memory per part
    sizes: tuple[int, ...]  # the slots from images to stream


@cache
def _tile(channels: int) -> int:
    """Elements of a tile: whole pixels and whole vectors."""
    tile = math.lcm(channels, 16)
    return tile * max(1, _TILE // tile)


def plan_of(x: Tensor, pool: int | None) -> Plan:
    """The plan for a dense tensor."""
    return _plan(x.shape, x.element_size(), is_rows(x), pool, torch.get_num_threads())


@lru_cache(1024)
def _plan(shape: torch.Size, size: int, rows: bool, pool: int | None, most_threads: int) -> Plan:
    images, channels = shape[0], shape[1]
    height, width = (shape[2], shape[3]) if pool else (1, math.prod(shape[2:]))
    threads = max(1, min(most_threads, math.prod(shape) // _GRAIN))
    image_parts, channel_parts = (threads, 1) if rows or channels < threads else (1, threads)
    tile = _tile(channels)
    sums_bytes = _rounded(8 * channels * (2 * image_parts + 1), 64)
    line = _rounded(4 * width * channels, 64) if rows and pool else 0
    step = _TABLES * tile + line if rows else 0
    # What is streamed is whole aligned vectors: so every run of elements that a kernel starts anew must be.
    run = width * channels if rows else width
    aligned = run % 16 == 0 or (rows and not pool)
    streamed = aligned and math.prod(shape) * size >= _STREAMED
    sizes = (images, channels, height, width, tile, image_parts, channel_parts, streamed)
    fused = not rows and image_parts == 1
    # A channel of short planes is scattered in memory; its second pass is faster in the order of addresses.
    fused_forward = fused and height * width >= _SCATTERED
    cut = (threads, image_parts, channel_parts, fused, fused_forward)
    return Plan(rows, channels, *cut, sums_bytes, step, sizes)


def _rounded(number: int, multiple: int) -> int:
    """Up to the next multiple."""
    return -(-number // multiple) * multiple
