"""How the work on one tensor is cut: layout, threads, tiles, working memory. Depends on its shape alone."""

import math
from functools import cache
from typing import NamedTuple

import torch

from ...epilogue import MaxPool, Pool
from .arguments import ACCUMULATOR, MARGIN, NEAR, Arguments

_GRAIN = 16384  # elements below which a further thread costs more than it brings
_GROUP_BYTES = 512 << 10  # of a group's planes in all images
_MOST = 64  # channels in a group
_TABLES = 48  # bytes of working memory per element of a tile
_TILE = 256  # elements of a tile at least: a sum is in a register again before its turn comes
_STREAMED = 24 << 20  # bytes of the tensors moved, from which an output has left the caches before it is read
_STEP, _ALONE = 4, 2  # tensors of a training step; of a forward pass by itself


class Plan(NamedTuple):
    """How one tensor is laid out and its work cut."""

    channels_last: bool  # the channels lie side by side: channels_last, (N, C), and one value a plane
    threads: int
    fused: bool  # one part sees the whole of a channel, so that forward and backward pass are one kernel each
    parts: int
    means: int  # where in the working memory the two means of a backward pass are, after the sums
    own: int  # and where what belongs to one part begins
    bytes: int  # of working memory in all
    sizes: dict[str, float]  # all fields of ``Arguments``, those that depend on the shape set
    alone: dict[str, float]  # the same for a forward pass by itself, not in a training step


@cache
def _tile(channels: int) -> int:
    """Elements of a tile: whole pixels and whole vectors."""
    tile = math.lcm(channels, 16)
    return tile * max(1, _TILE // tile)


def _group(nbytes: int, plane: int, channels: int) -> int:
    """Channels to work on together, each of so many bytes; in one image their planes are a run of KiB."""
    return 1 if plane > NEAR else max(1, min(_MOST, channels, _GROUP_BYTES // nbytes))


def _phase(window: MaxPool, width: int) -> int:
    """Elements of a row's phase (``jit/max_pool.py``), and what vectors reach beyond them."""
    kernel, stride, padding = window
    return _rounded((width + 2 * padding) // stride + kernel // stride + 34, 16)


def _window_bytes(
    window: MaxPool, channels_last: bool, phase: int, height: int, width: int, channels: int
) -> int:
    """Working memory of a part: a ring of activated rows; contiguous a row and a plane's gradient too."""
    if channels_last:
        return window.kernel * (4 * width * channels + 64)
    row = max(window.stride * phase, window.kernel * (phase + MARGIN))
    return 4 * (window.kernel * row + width + 48 + height * width + 48)


def plan_of(shape: torch.Size, size: int, contiguous: bool, pool: Pool, most_threads: int) -> Plan:
    """The plan for dense tensors of this shape, ``size`` bytes an element, on so many threads at most."""
    images, channels = shape[0], shape[1]
    window = pool if isinstance(pool, MaxPool) else None
    height, width = (shape[2], shape[3]) if pool else (1, math.prod(shape[2:]))
    channels_last = not contiguous or height * width == 1
    threads = max(1, min(most_threads, math.prod(shape) // _GRAIN))
    image_parts, channel_parts = (threads, 1) if channels_last or channels < threads else (1, threads)
    tile, phase = _tile(channels), 0
    sums_bytes = _rounded(8 * channels * (2 * image_parts + 1), 64)
    group = _group(images * height * width * size, height * width, channels)
    step = _TABLES * tile if channels_last else ACCUMULATOR * group
    if window is not None:
        phase = _phase(window, width)
        step += _rounded(_window_bytes(window, channels_last, phase, height, width, channels), 64)
    elif channels_last and pool:
        step += _rounded(4 * width * channels, 64)
    # What is streamed is whole aligned vectors: so every run of elements that a kernel starts anew must be.
    run = width * (channels if channels_last else height if window else 1)
    aligned = run % 16 == 0 or (channels_last and not pool)
    streamed, alone = (aligned and n * math.prod(shape) * size >= _STREAMED for n in (_STEP, _ALONE))
    sizes = Arguments(
        scratch_step=step,
        images=images,
        channels=channels,
        height=height,
        width=width,
        tile=tile,
        phase=phase,
        group=group,
        image_parts=image_parts,
        channel_parts=channel_parts,
    )
    fused = not channels_last and image_parts == 1
    parts = image_parts * channel_parts
    shared = sums_bytes + _rounded(8 * channels, 64)
    nbytes = shared + parts * step
    given = (sizes._replace(stream=stream)._asdict() for stream in (streamed, alone))
    return Plan(channels_last, threads, fused, parts, sums_bytes, shared, nbytes, *given)


def _rounded(number: int, multiple: int) -> int:
    """Up to the next multiple."""
    return -(-number // multiple) * multiple
