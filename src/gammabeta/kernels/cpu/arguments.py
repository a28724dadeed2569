"""What a compiled kernel is handed: the address of a record of 64-bit fields, which it reads by name.

A record is a ``NamedTuple`` whose fields all have a default: 0 for an int64, 0.0 for a float64. The host
packs it (``packer``), and a kernel that declares it (``jit.record.takes``) reads ``args.channels``. A field
that holds an address is 0 where the tensor is absent.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# What the plan must know of the working memory of ``jit.channels_first`` and ``jit.max_pool``
NEAR = 1024  # elements of a plane too short for the processor to foresee the next image's
ACCUMULATOR = 448  # bytes for each channel of a group
RUN = 16  # tiles that are worked on together at most, where there is a mask
MARGIN = 16  # zeros before a piece of a row of gradients, for the columns to the left of its first window


class Arguments(NamedTuple):
    """What the kernels of batch normalization are handed."""

    # (N, C, S) tensors in the storage type
    x: int = 0
    residual: int = 0
    grad: int = 0
    out: int = 0
    dx: int = 0
    dresidual: int = 0
    codes: int = 0  # one byte for each element of out: which of its window it is (``max_pool``)
    # (C,) float32
    mean: int = 0
    var: int = 0
    invstd: int = 0
    weight: int = 0
    bias: int = 0
    leak: int = 0  # slopes below zero that are learned, one a channel
    dweight: int = 0
    dbias: int = 0
    mean_dz: int = 0
    mean_dz_xhat: int = 0
    sums: int = 0  # float64 (image_parts, 2, C) partial sums, then (C,): what every channel was shifted by
    scratch: int = 0  # working memory
    scratch_step: int = 0  # the bytes of it that each part has
    # sizes; without pooling height is 1 and width is all of S
    images: int = 0
    channels: int = 0
    height: int = 0
    width: int = 0
    tile: int = 0  # channels_last: elements in a tile, a whole number of pixels
    phase: int = 0  # contiguous: elements in a row's phase (``max_pool``)
    group: int = 0  # contiguous: channels that are worked on together (``channels_first``)
    # how the work is cut: part = image_part * channel_parts + channel_part
    image_parts: int = 0
    channel_parts: int = 0
    stream: int = 0  # 1: write the output past the caches
    # what a mask keeps (``masked``, ``masked_rows``)
    mask: int = 0  # (N, S) bytes
    places: int = 0  # int64 (5,): pixels that are kept, far apart
    kept: int = 0  # values of a channel; 0: all
    eps: float = 0.0


class RunningArguments(NamedTuple):
    """What ``update_running`` is handed: (C,) float32, ``var`` biased and ``running_var`` unbiased."""

    mean: int = 0
    var: int = 0
    running_mean: int = 0
    running_var: int = 0
    done: int = 0  # the address of an int64: 1 if the statistics were updated
    channels: int = 0
    samples: int = 0  # values of a channel in the batch
    skip: int = 0  # 1: statistics that are not finite update nothing
    factor: float = 0.0  # the weight of the new value


class Job(NamedTuple):
    """What ``reductions.work`` is handed: parts of a kernel that threads share."""

    next: int = 0  # the next part that no thread has taken; it grows while they work
    parts: int = 0
    kernel: int = 0  # its address
    args: int = 0  # the address of its own arguments


def packer(record: Any) -> Callable[..., bytes]:
    """``pack(fields)`` for a record: its bytes with these fields, by name, and the defaults of the others.

    ``pack(fields, constants)`` takes the others from a mapping that has every field, in order, as that of
    ``record(...)._asdict()``.
    """
    defaults: dict[str, float] = record._field_defaults
    to_bytes = struct.Struct("=" + "".join("qd"[type(value) is float] for value in defaults.values())).pack

    def pack(fields: Mapping[str, float], constants: Mapping[str, float] = defaults) -> bytes:
        return to_bytes(*{**constants, **fields}.values())

    return pack
