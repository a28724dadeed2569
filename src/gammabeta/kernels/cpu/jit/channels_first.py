"""Contiguous tensors, forward: for each image and channel a plane of S values.

Maths: see ``gammabeta.kernels``. Memory moved, in units of x: statistics read 1; forward reads 1 (2 with a
residual) and writes 1 (¼ with pooling); the two in one, group of channels by group, read x from memory once
where the group's planes fit in a core's cache.

A channel's own planes are scattered over memory in pieces, short ones in a few cache lines that no prefetcher
foresees. Those of a *group* of channels are a run of some KiB; so its channels are summed up image by image,
and what each has summed so far stays in working memory, one *accumulator* a channel: sixteen float32 lanes of
two sums, and the same in float64. The plan makes groups that fit in a core's cache; long planes are groups of
one.
"""

from ..arguments import ACCUMULATOR, NEAR, Arguments
from .loads import fence, float32, float64, get_f64, prefetch, prefetch_write, put_f64
from .max_pool import out_plane_of, pool_plane_of, window_of
from .pointwise import Run, Values, affine_of, centred_of, forward_of
from .record import takes
from .reductions import put_statistics, shift_of
from .simd import even_lanes, fma, inlined, odd_lanes, splat, total, widen
from .tables import cut, memory, step_of

SUMMED = 1024  # elements of a plane that are summed in float32
PIECE = 8192  # elements of a plane that one part takes at a time
READ_AHEAD, WRITE_AHEAD = 4096, 2048  # bytes within a plane

_load, _store = float32.load, float32.store
_load_wide, _store_wide = float64.load, float64.store

# --- accumulators -----------------------------------------------------------------------------------------

FIRST = 48  # where an accumulator has what its sums are about, behind both sums in float32 and in float64
BLOCK = 256  # values after which the float32 sums are added to the float64 ones


@inlined
def reset(accumulator, first):
    """All sums zero; ``first`` is what they are about."""
    for at in range(0, 96, 16):
        _store(accumulator, at, splat(0.0))
    put_f64(accumulator, FIRST, first)


@inlined
def _flush(accumulator):
    """Add the float32 sums to the float64 ones, and clear them."""
    for at in range(0, 32, 16):
        added = _load_wide(accumulator, 16 + at) + widen(_load(accumulator, at))
        _store_wide(accumulator, 16 + at, added)
        _store(accumulator, at, splat(0.0))


@inlined
def totals_of(accumulator):
    """The two float64 sums of all lanes."""
    return total(_load_wide(accumulator, 16)), total(_load_wide(accumulator, 32))


@inlined
def store_totals(args, part, accumulator, c):
    """Write the totals of a channel as the sums of an image part."""
    one, two = totals_of(accumulator)
    put_f64(args.sums, 2 * part * args.channels + c, one)
    put_f64(args.sums, (2 * part + 1) * args.channels + c, two)


# --- groups of channels -----------------------------------------------------------------------------------


@inlined
def own_channels(args, part):
    """The image part, the first channel of a part and the one behind its last, and those of a group."""
    span, parts = part % args.channel_parts, args.channel_parts
    start, stop = cut(args.channels, parts, span), cut(args.channels, parts, span + 1)
    return part // parts, start, stop, step_of(args.group)


@inlined
def own_planes(args, part):
    """The first plane of a part and the one behind its last."""
    parts, planes = args.image_parts * args.channel_parts, args.images * args.channels
    return cut(planes, parts, part), cut(planes, parts, part + 1)


@inlined
def fetch_next(plane, image, images, step, group, nbytes):
    """Ask for the plane that follows ``images`` apart, or as the first of the next group.

    ``step`` and ``group`` are the bytes from one image, and from one group, to the next.
    """
    further = step if image + 1 < images else group - image * step
    for line in range(0, nbytes + 63, 64):
        prefetch(plane + further + line)


# --- statistics -------------------------------------------------------------------------------------------


@takes(Arguments)
def channels_first_statistics(storage, activation, residual, pool):
    """Σ(x - k) and Σ(x - k)² of each part, k being a value of the channel (``reductions.shift_of``)."""
    sum_group = sum_group_of(storage, shift_of(storage), centred_of(storage))

    def kernel(args, part):
        image_part, start, stop, group = own_channels(args, part)
        units = args.images * _blocks_of(args)
        first, last = cut(units, args.image_parts, image_part), cut(units, args.image_parts, image_part + 1)
        accumulators = memory(args, part)
        for c0 in range(start, stop, group):
            c1 = min(c0 + group, stop)
            sum_group(args, accumulators, c0, c1, first, last)
            for c in range(c0, c1):
                accumulator = accumulators + (c - c0) * ACCUMULATOR
                store_totals(args, image_part, accumulator, c)
                if image_part == 0:
                    k = get_f64(accumulator, FIRST)
                    put_f64(args.sums, 2 * args.image_parts * args.channels + c, k)

    return kernel


@inlined
def _blocks_of(args):
    """The pieces of a plane that are summed in float32 each."""
    return (args.height * args.width + SUMMED - 1) // SUMMED


@inlined
def pieces_of(args):
    """The pieces of a plane."""
    return (args.height * args.width + PIECE - 1) // PIECE


def sum_group_of(storage, shift, centred):
    """Σ(x - k) and Σ(x - k)² of channels ``c0`` to ``c1`` over the pieces ``start`` to ``stop``.

    Pieces are numbered image by image. ``shift(args, c, channel_step, value_step)`` gives k.
    """
    size, add = storage.size, _add_of(storage, centred)

    @inlined
    def sum_group(args, accumulators, c0, c1, start, stop):
        channels, plane, pieces = args.channels, args.height * args.width, _blocks_of(args)
        for c in range(c0, c1):
            reset(accumulators + (c - c0) * ACCUMULATOR, shift(args, c, plane, 1))
        pending = 0
        for unit in range(start, stop):
            image, piece = unit // pieces, unit % pieces
            length = min(SUMMED, plane - piece * SUMMED)
            for c in range(c0, c1):
                accumulator = accumulators + (c - c0) * ACCUMULATOR
                here = args.x + ((image * channels + c) * plane + piece * SUMMED) * size
                if plane <= NEAR:
                    step = plane * size
                    fetch_next(here, image, args.images, channels * step, (c1 - c0) * step, step)
                values = Values(here, args.mask + image * plane + piece * SUMMED)
                add(values, length, accumulator)
            pending += length
            if pending >= BLOCK or unit + 1 == stop:
                for c in range(c0, c1):
                    _flush(accumulators + (c - c0) * ACCUMULATOR)
                pending = 0

    return sum_group


def _add_of(storage, centred):
    """Add ``length`` elements to the float32 sums."""
    size, (whole, some) = storage.size, centred

    @inlined
    def add(values, length, accumulator):
        k, zero = splat(get_f64(accumulator, FIRST)), splat(0.0)
        s0, q0 = _load(accumulator, 0), _load(accumulator, 16)
        s1 = s2 = s3 = q1 = q2 = q3 = zero
        i = 0
        while i + 64 <= length:
            for line in range(0, 64, 16):
                prefetch(values.x + (i + line) * size + READ_AHEAD)
            d0 = whole(values, i, k)
            d1 = whole(values, i + 16, k)
            d2 = whole(values, i + 32, k)
            d3 = whole(values, i + 48, k)
            s0 = s0 + d0
            s1 = s1 + d1
            s2 = s2 + d2
            s3 = s3 + d3
            q0 = fma(d0, d0, q0)
            q1 = fma(d1, d1, q1)
            q2 = fma(d2, d2, q2)
            q3 = fma(d3, d3, q3)
            i += 64
        while i + 16 <= length:
            d0 = whole(values, i, k)
            s0 = s0 + d0
            q0 = fma(d0, d0, q0)
            i += 16
        if i < length:
            d0 = some(values, i, length - i, k)
            s1 = s1 + d0
            q1 = fma(d0, d0, q1)
        _store(accumulator, 0, (s0 + s1) + (s2 + s3))
        _store(accumulator, 16, (q0 + q1) + (q2 + q3))

    return add


# --- forward ----------------------------------------------------------------------------------------------


@takes(Arguments)
def channels_first_forward(storage, activation, residual, pool):
    """Every plane by itself, with the statistics given."""
    prepare, forward_plane = _forward_plane_of(storage, activation, residual, pool)

    def kernel(args, part):
        scratch, (start, stop) = prepare(args, part), own_planes(args, part)
        for p in range(start, stop):
            forward_plane(args, p, p % args.channels, scratch)
        if args.stream != 0:
            fence()

    return kernel


@takes(Arguments)
def channels_first_train(storage, activation, residual, pool):
    """Statistics and forward of one group of channels after the other."""
    sum_group = sum_group_of(storage, shift_of(storage), centred_of(storage))

    @inlined
    def count(args):
        return args.images * args.height * args.width

    return train_of(sum_group, _forward_plane_of(storage, activation, residual, pool), count)


def train_of(sum_group, forward, count):
    """The kernel that sums up a group of channels, each of ``count(args)`` values, and then computes it."""
    prepare, forward_plane = forward

    def kernel(args, part):
        _, start, stop, group = own_channels(args, part)
        accumulators, scratch = memory(args, part), prepare(args, part)
        for c0 in range(start, stop, group):
            c1 = min(c0 + group, stop)
            sum_group(args, accumulators, c0, c1, 0, args.images * _blocks_of(args))
            for c in range(c0, c1):
                found = accumulators + (c - c0) * ACCUMULATOR
                one, two = totals_of(found)
                put_statistics(args, c, get_f64(found, FIRST), one, two, count(args))
            for image in range(args.images):
                for c in range(c0, c1):
                    forward_plane(args, image * args.channels + c, c, scratch)
        if args.stream != 0:
            fence()

    return kernel


@inlined
def no_memory(args, part):
    """Where a part needs no working memory but for its accumulators."""
    return 0


def _forward_plane_of(storage, activation, residual, pool):
    """``out = pool(activation((x - mean) * scale + bias + residual))`` over one plane.

    Before it, what prepares the working memory of a part and gives its address.
    """
    size, out_plane, window = storage.size, out_plane_of(pool), window_of(pool)
    whole, some = forward_of(storage, activation, residual)
    prepare = no_memory
    if window is not None:
        prepare, compute = pool_plane_of(storage, window, whole, some)
    elif pool:
        compute = _mean_pooled(storage, some)
    else:
        compute = _whole_plane(flat_of(storage, residual, whole, some))

    @inlined
    def forward_plane(args, p, c, scratch):
        here, there = p * args.height * args.width * size, p * out_plane(args)
        codes = args.codes + there if args.codes != 0 else 0
        run = Run(args.x + here, args.residual + here, args.out + there * size, 0, args.stream)
        compute(args, run, codes, scratch, affine_of(args, c))

    return prepare, forward_plane


def flat_of(storage, residual, whole, some):
    """A run of values, without pooling."""
    store, store_some, size, stream = storage.store, storage.store_some, storage.size, storage.stream

    @inlined
    def flat(run, length, affine):
        streamed, i = run.stream != 0, 0
        while i + 64 <= length:
            for at in range(i, i + 64, 16):
                prefetch(run.x + at * size + READ_AHEAD)
                if residual:
                    prefetch(run.residual + at * size + READ_AHEAD)
                if streamed:
                    stream(run.out, at, whole(run, at, affine))
                else:
                    prefetch_write(run.out + at * size + WRITE_AHEAD)
                    store(run.out, at, whole(run, at, affine))
            i += 64
        while i + 16 <= length:
            store(run.out, i, whole(run, i, affine))
            i += 16
        if i < length:
            store_some(run.out, i, some(run, i, length - i, affine), length - i)

    return flat


def _whole_plane(flat):
    """The same of a plane."""

    @inlined
    def compute(args, run, codes, scratch, affine):
        flat(run, args.height * args.width, affine)

    return compute


def _mean_pooled(storage, some):
    """With the mean of 2x2."""
    store_some, size = storage.store_some, storage.size

    @inlined
    def row_of(run, start):
        """The run of a row, which begins ``start`` bytes from the plane."""
        return Run(run.x + start, run.residual + start, 0, 0, 0)

    @inlined
    def pair_of_rows(above, below, at, count, affine):
        """The sums of values and those below them."""
        return some(above, at, count, affine) + some(below, at, count, affine)

    @inlined
    def mean_pooled(args, run, codes, scratch, affine):
        pairs, row_bytes = args.width // 2, args.width * size
        for row in range(args.height // 2):
            above, below = row_of(run, 2 * row * row_bytes), row_of(run, (2 * row + 1) * row_bytes)
            for i in range(0, pairs, 16):
                left = 2 * (pairs - i)
                p = pair_of_rows(above, below, 2 * i, min(16, left), affine)
                q = pair_of_rows(above, below, 2 * i + 16, max(0, min(16, left - 16)), affine)
                y = (even_lanes(p, q) + odd_lanes(p, q)) * splat(0.25)
                store_some(run.out, row * pairs + i, y, min(16, pairs - i))

    return mean_pooled
