"""Contiguous tensors, forward: for each image and channel a plane of S values.

Maths: see ``gammabeta.kernels``. Memory moved, in units of x: statistics read 1; forward reads 1 (2 with a
residual) and writes 1 (¼ with pooling); the two in one, group of channels by group (``groups``), read x from
memory once where the group's planes fit in a core's cache.
"""

import math

from ..arguments import ACCOUNT, NEAR, Arguments
from .groups import (
    FIRST,
    SETTLED,
    SHIFT,
    SQUARES,
    TOTAL,
    accounts,
    book,
    cut,
    fetch_next,
    held,
    open_account,
    put,
)
from .loads import fence, get_f32, get_f64, prefetch, prefetch_write, put_f32, put_f64
from .max_pool import out_plane_of, pool_plane_of, window_of
from .pointwise import forward
from .record import takes
from .simd import even_lanes, first_lanes, fma, inlined, odd_lanes, select, splat, total

PIECE = 8192  # elements of a plane that one part takes at a time
READ_AHEAD, WRITE_AHEAD = 4096, 2048  # bytes within a plane


@inlined
def scale_and_bias(args, c):
    """``weight * invstd`` and ``bias`` of a channel."""
    weight, bias = args.weight, args.bias
    scale = get_f32(args.invstd, c)
    if weight != 0:
        scale *= get_f32(weight, c)
    return scale, (get_f32(bias, c) if bias != 0 else 0.0)


@inlined
def no_memory(args, part):
    """Where a part needs no working memory but for its accounts."""
    return 0


# --- statistics -------------------------------------------------------------------------------------------


def _group_sums(storage):
    """Σ(x - k) and Σ(x - k)² of a group's channels over some pieces, k being a channel's first value."""
    load, load_some, get, size = storage.load, storage.load_some, storage.get, storage.size

    @inlined
    def begin(here, length, account):
        """The next sums are about the mean of the first values (of equal values: the value)."""
        shift = total(load(here, 0)) / 16 if length >= 16 else float(get(here, 0))
        put_f32(account, SHIFT, shift)
        put(account, splat(0.0), splat(0.0))

    @inlined
    def add(here, length, account):
        k, zero = splat(get_f32(account, SHIFT)), splat(0.0)
        s0, q0 = held(account)
        s1 = s2 = s3 = q1 = q2 = q3 = zero
        i = 0
        while i + 64 <= length:
            for line in range(0, 64, 16):
                prefetch(here + (i + line) * size + READ_AHEAD)
            d0 = load(here, i) - k
            d1 = load(here, i + 16) - k
            d2 = load(here, i + 32) - k
            d3 = load(here, i + 48) - k
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
            d0 = load(here, i) - k
            s0 = s0 + d0
            q0 = fma(d0, d0, q0)
            i += 16
        if i < length:
            left = length - i
            d0 = select(first_lanes(left), load_some(here, i, left) - k, zero)
            s1 = s1 + d0
            q1 = fma(d0, d0, q1)
        put(account, (s0 + s1) + (s2 + s3), (q0 + q1) + (q2 + q3))

    @inlined
    def settle(account, pending):
        s, q = held(account)
        s, q = total(s), total(q)
        d = float(get_f32(account, SHIFT)) - get_f64(account, FIRST)
        book(account, pending * d + s, q + d * (2.0 * s + pending * d))

    @inlined
    def group_sums(args, begins, c0, c1, start, stop):
        """Pieces ``start`` to ``stop`` of channels ``c0`` to ``c1``."""
        x, images, channels = args.x, args.images, args.channels
        plane = args.height * args.width
        pieces = (plane + PIECE - 1) // PIECE
        for c in range(c0, c1):
            open_account(begins + (c - c0) * ACCOUNT, float(get(x, c * plane)))
        pending = 0
        for unit in range(start, stop):
            image, piece = unit // pieces, unit % pieces
            length = min(PIECE, plane - piece * PIECE)
            for c in range(c0, c1):
                account = begins + (c - c0) * ACCOUNT
                here = x + ((image * channels + c) * plane + piece * PIECE) * size
                if plane <= NEAR:
                    step = plane * size
                    fetch_next(here, image, images, channels * step, (c1 - c0) * step, step)
                if pending == 0:
                    begin(here, length, account)
                add(here, length, account)
            pending += length
            if pending >= SETTLED or unit + 1 == stop:
                for c in range(c0, c1):
                    settle(begins + (c - c0) * ACCOUNT, pending)
                pending = 0

    return group_sums


@takes(Arguments)
def planes_statistics(storage, activation, residual, pool):
    """Σ(x - k) and Σ(x - k)² of each part, k being the channel's first value."""
    group_sums = _group_sums(storage)

    def kernel(args, part):
        sums, channels, group = args.sums, args.channels, args.group
        plane = args.height * args.width
        units = args.images * ((plane + PIECE - 1) // PIECE)
        image_parts, channel_parts = args.image_parts, args.channel_parts
        mine, span = part // channel_parts, part % channel_parts
        start, stop = cut(units, image_parts, mine), cut(units, image_parts, mine + 1)
        begins, end = accounts(args, part), cut(channels, channel_parts, span + 1)
        for c0 in range(cut(channels, channel_parts, span), end, group):
            c1 = min(c0 + group, end)
            group_sums(args, begins, c0, c1, start, stop)
            for c in range(c0, c1):
                account = begins + (c - c0) * ACCOUNT
                put_f64(sums, 2 * mine * channels + c, get_f64(account, TOTAL))
                put_f64(sums, (2 * mine + 1) * channels + c, get_f64(account, SQUARES))
                if mine == 0:
                    put_f64(sums, 2 * image_parts * channels + c, get_f64(account, FIRST))

    return kernel


# --- forward ----------------------------------------------------------------------------------------------


def _plane_forward(storage, activation, residual, pool):
    """``out = pool(activation((x - mean) * scale + bias + residual))`` over one plane.

    Before it, what prepares the working memory of a part and gives its address.
    """
    store, store_some, size, stream = storage.store, storage.store_some, storage.size, storage.stream

    one, one_some = forward(storage, activation, residual)

    @inlined
    def plain(x, res, out, height, width, m, s, b, streamed):
        plane = height * width
        i = 0
        while i + 64 <= plane:
            for at in range(i, i + 64, 16):
                prefetch(x + at * size + READ_AHEAD)
                if residual:
                    prefetch(res + at * size + READ_AHEAD)
                if streamed:
                    stream(out, at, one(x, res, at, m, s, b))
                else:
                    prefetch_write(out + at * size + WRITE_AHEAD)
                    store(out, at, one(x, res, at, m, s, b))
            i += 64
        while i + 16 <= plane:
            store(out, i, one(x, res, i, m, s, b))
            i += 16
        if i < plane:
            store_some(out, i, one_some(x, res, i, plane - i, m, s, b), plane - i)

    @inlined
    def pooled(x, res, out, height, width, m, s, b, streamed):
        quarter = splat(0.25)
        pairs = width // 2
        for row in range(height // 2):
            above = 2 * row * width * size
            below = above + width * size
            for i in range(0, pairs, 16):
                left = min(16, 2 * (pairs - i))
                right = max(0, min(16, 2 * (pairs - i) - 16))
                at = 2 * i
                p = one_some(x + above, res + above, at, left, m, s, b)
                p = p + one_some(x + below, res + below, at, left, m, s, b)
                q = one_some(x + above, res + above, at + 16, right, m, s, b)
                q = q + one_some(x + below, res + below, at + 16, right, m, s, b)
                y = (even_lanes(p, q) + odd_lanes(p, q)) * quarter
                store_some(out, row * pairs + i, y, min(16, pairs - i))

    window = window_of(pool)
    if window is not None:
        prepare, pool_plane = pool_plane_of(storage, window, one, one_some)

        @inlined
        def over(args, x, res, there, scratch, height, width, m, s, b):
            codes = args.codes
            if codes != 0:
                codes += there
            out, phase = args.out + there * size, args.phase
            pool_plane(x, res, out, codes, scratch, phase, height, width, m, s, b)

    else:
        prepare, flat = no_memory, pooled if pool else plain

        @inlined
        def over(args, x, res, there, scratch, height, width, m, s, b):
            out, streamed = args.out + there * size, args.stream != 0
            flat(x, res, out, height, width, m, s, b, streamed)

    out_plane = out_plane_of(pool)

    @inlined
    def plane_forward(args, p, c, scratch):
        height, width = args.height, args.width
        scale, bias = scale_and_bias(args, c)
        here, there = p * height * width * size, p * out_plane(height, width)
        x, res, m = args.x + here, args.residual + here, get_f32(args.mean, c)
        over(args, x, res, there, scratch, height, width, splat(m), splat(scale), splat(bias))

    return prepare, plane_forward


@takes(Arguments)
def planes_forward(storage, activation, residual, pool):
    """Every plane by itself, with the statistics given."""
    prepare, plane_forward = _plane_forward(storage, activation, residual, pool)

    def kernel(args, part):
        parts = args.image_parts * args.channel_parts
        channels, scratch = args.channels, prepare(args, part)
        planes = args.images * channels
        for p in range(cut(planes, parts, part), cut(planes, parts, part + 1)):
            plane_forward(args, p, p % channels, scratch)
        if args.stream != 0:
            fence()

    return kernel


@takes(Arguments)
def planes_train(storage, activation, residual, pool):
    """Statistics and forward of one group of channels after the other."""
    group_sums = _group_sums(storage)
    prepare, plane_forward = _plane_forward(storage, activation, residual, pool)

    @inlined
    def finish(args, account, c, count):
        off = get_f64(account, TOTAL) / count
        v = get_f64(account, SQUARES) / count - off * off
        if v < 0.0:
            v = 0.0
        put_f32(args.mean, c, get_f64(account, FIRST) + off)
        put_f32(args.var, c, v)
        put_f32(args.invstd, c, 1.0 / math.sqrt(v + args.eps))

    def kernel(args, part):
        images, channels, group = args.images, args.channels, args.group
        plane, parts = args.height * args.width, args.channel_parts
        units, count = images * ((plane + PIECE - 1) // PIECE), float(images * plane)
        begins, scratch = accounts(args, part), prepare(args, part)
        end = cut(channels, parts, part + 1)
        for c0 in range(cut(channels, parts, part), end, group):
            c1 = min(c0 + group, end)
            group_sums(args, begins, c0, c1, 0, units)
            for c in range(c0, c1):
                finish(args, begins + (c - c0) * ACCOUNT, c, count)
            for image in range(images):
                for c in range(c0, c1):
                    plane_forward(args, image * channels + c, c, scratch)
        if args.stream != 0:
            fence()

    return kernel
