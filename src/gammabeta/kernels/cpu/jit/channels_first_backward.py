"""Contiguous tensors, backward: for each image and channel a plane of S values.

Maths: see ``gammabeta.kernels``. Memory moved, in units of x: reduce reads 2 (1¼ with pooling, 1 more with
a residual) and writes 1 where the residual wants its gradient, which is dz; apply reads 2 and writes 1; the
two in one, group of channels by group, read everything from memory once where the group's planes fit in a
core's cache.
"""

from ..arguments import ACCOUNT, NEAR, Arguments
from .activations import ACTIVATIONS
from .channels_first import PIECE, READ_AHEAD, WRITE_AHEAD, no_memory, scale_and_bias
from .groups import SETTLED, SQUARES, TOTAL, accounts, book, cut, fetch_next, held, open_account, put
from .loads import fence, float32, get_f32, get_f64, prefetch, prefetch_write, put_f32, put_f64
from .max_pool import out_plane_of, spread_plane_of, window_of
from .record import takes
from .simd import first_lanes, fma, inlined, mixed_high, mixed_low, select, splat, total


def _walk(storage, activation, residual, pool, visit):
    """A walk over a plane, unit by unit, that hands ``x - mean`` and ``dz`` to ``visit`` sixteen at a time.

    A unit is a piece of the plane; with the mean of 2x2 a pair of rows, whose gradient is taken apart lane by
    lane. That of windows comes spread, as a float32 plane. ``out`` is whatever ``visit`` needs, and ``sums``
    what it adds up.
    """
    load, load_some, size = storage.load, storage.load_some, storage.size
    windowed = window_of(pool) is not None
    grads = float32 if windowed else storage
    grad_load, grad_load_some, quartered = grads.load, grads.load_some, pool and not windowed
    activation_backward = activation.backward

    @inlined
    def some(x, res, g, at, count, constants, out, sums):
        m, s, b = constants[:3]
        centred = select(first_lanes(count), load_some(x, at, count) - m, splat(0.0))
        z = fma(centred, s, b)
        if residual:
            z = z + load_some(res, at, count)
        dz = select(first_lanes(count), activation_backward(z, g), splat(0.0))
        return visit(centred, dz, at, count, constants, out, sums)

    @inlined
    def full(x, res, grad, at, constants, out, sums):
        m, s, b = constants[:3]
        prefetch(x + at * size + READ_AHEAD)
        prefetch(grad + at * size + READ_AHEAD)
        if residual:
            prefetch(res + at * size + READ_AHEAD)
        centred = load(x, at) - m
        z = fma(centred, s, b)
        if residual:
            z = z + load(res, at)
        return visit(centred, activation_backward(z, grad_load(grad, at)), at, 16, constants, out, sums)

    @inlined
    def units(height, width):
        return (height + 1) // 2 if quartered else (height * width + PIECE - 1) // PIECE

    @inlined
    def plain(unit, x, res, grad, height, width, constants, out, sums):
        plane = height * width
        at, stop = unit * PIECE, min((unit + 1) * PIECE, plane)
        one, two = sums
        while at + 32 <= stop:
            one = full(x, res, grad, at, constants, out, one)
            two = full(x, res, grad, at + 16, constants, out, two)
            at += 32
        if at + 16 <= stop:
            one = full(x, res, grad, at, constants, out, one)
            at += 16
        if at < stop:
            left = stop - at
            two = some(x, res, grad_load_some(grad, at, left), at, left, constants, out, two)
        return (one, two), stop - unit * PIECE

    @inlined
    def pooled(unit, x, res, grad, height, width, constants, out, sums):
        one, two = sums
        pairs = width // 2
        rows = min(2, height - 2 * unit)
        for i in range(0, width, 32):
            here = max(0, min(16, pairs - i // 2)) if rows == 2 else 0
            g = load_some(grad, unit * pairs + i // 2, here) * splat(0.25)
            for row in range(rows):
                at = (2 * unit + row) * width + i
                one = some(x, res, mixed_low(g, g), at, min(16, width - i), constants, out, one)
                if width > i + 16:
                    two = some(
                        x, res, mixed_high(g, g), at + 16, min(16, width - i - 16), constants, out, two
                    )
        return (one, two), rows * width

    return pooled if quartered else plain, units


def _gradient(storage, pool):
    """What prepares a part's working memory, and what gives the address of a plane's gradient."""
    window, size, out_plane = window_of(pool), storage.size, out_plane_of(pool)
    if window is not None:
        prepare, spread_plane = spread_plane_of(storage, window)

        @inlined
        def gradient(args, grad, p, scratch, height, width):
            return spread_plane(args, grad, p * out_plane(height, width), scratch, height, width)

    else:
        prepare = no_memory

        @inlined
        def gradient(args, grad, p, scratch, height, width):
            return grad + p * out_plane(height, width) * size

    return prepare, gradient


def _group_reduce(storage, activation, residual, pool):
    """Σdz and Σdz·(x - mean) of a group's channels over some images, as the totals of their accounts.

    Where the residual wants its gradient dz is written too, for the residual and for the second pass.
    """
    store, store_some = storage.store, storage.store_some

    @inlined
    def add(centred, dz, at, count, constants, out, sums):
        if residual and out != 0:
            if count == 16:
                store(out, at, dz)
            else:
                store_some(out, at, dz, count)
        return sums[0] + dz, fma(dz, centred, sums[1])

    walk, units = _walk(storage, activation, residual, pool, add)
    size, out_plane = storage.size, out_plane_of(pool)
    prepare, gradient = _gradient(storage, pool)

    @inlined
    def fetch(args, p, image, group):
        """Ask for what this plane's successor reads."""
        images, channels = args.images, args.channels
        height, width = args.height, args.width
        step, grad_step = height * width * size, out_plane(height, width) * size
        fetch_next(args.x + p * step, image, images, channels * step, group * step, step)
        grad = args.grad + p * grad_step
        fetch_next(grad, image, images, channels * grad_step, group * grad_step, grad_step)

    @inlined
    def plane_reduce(args, p, c, account, pending, scratch):
        """Add a plane to the account of its channel; return the values not settled yet."""
        height, width = args.height, args.width
        here, dres = p * height * width * size, args.dresidual
        x, res, out = args.x + here, args.residual + here, dres + here if dres != 0 else 0
        scale, bias = scale_and_bias(args, c)
        zero = splat(0.0)
        constants = (splat(get_f32(args.mean, c)), splat(scale), splat(bias), zero, zero)
        grad = gradient(args, args.grad, p, scratch, height, width)
        sums = (held(account), (zero, zero))
        for unit in range(units(height, width)):
            sums, done = walk(unit, x, res, grad, height, width, constants, out, sums)
            pending += done
            if pending >= SETTLED:
                book(account, total(sums[0][0]) + total(sums[1][0]), total(sums[0][1]) + total(sums[1][1]))
                sums = ((zero, zero), (zero, zero))
                pending = 0
        put(account, sums[0][0] + sums[1][0], sums[0][1] + sums[1][1])
        return pending

    @inlined
    def group_reduce(args, begins, c0, c1, start, stop, scratch):
        """Images ``start`` to ``stop`` of channels ``c0`` to ``c1``."""
        channels = args.channels
        near = args.height * args.width <= NEAR
        for c in range(c0, c1):
            open_account(begins + (c - c0) * ACCOUNT, 0.0)
        before = 0
        for image in range(start, stop):
            pending = before
            for c in range(c0, c1):
                p = image * channels + c
                if near:
                    fetch(args, p, image, c1 - c0)
                before = plane_reduce(args, p, c, begins + (c - c0) * ACCOUNT, pending, scratch)
        for c in range(c0, c1):
            s, q = held(begins + (c - c0) * ACCOUNT)
            book(begins + (c - c0) * ACCOUNT, total(s), total(q))

    return prepare, group_reduce


def _plane_apply(storage, activation, residual, pool):
    """``dx = scale * (dz - mean_dz - xhat * mean_dz_xhat)`` over one plane, and ``dz`` where it is wanted."""
    store, store_some, stream, size = storage.store, storage.store_some, storage.stream, storage.size

    @inlined
    def put(centred, dz, at, count, constants, out, sums):
        _, s, _, a, k = constants
        dx, dres, streamed = out
        y = fma(dz, s, splat(0.0) - fma(centred, k, a))
        if count == 16 and streamed:
            stream(dx, at, y)
        elif count == 16:
            prefetch_write(dx + at * size + WRITE_AHEAD)
            store(dx, at, y)
        else:
            store_some(dx, at, y, count)
        if residual and dres != 0:
            store_some(dres, at, dz, count)
        return sums

    walk, units = _walk(storage, activation, residual, pool, put)
    prepare, gradient = _gradient(storage, pool)

    @inlined
    def plane_apply(args, grad, p, c, mean_dz, mean_dz_xhat, scratch):
        x, res, streamed = args.x, args.residual, args.stream != 0
        dx, dres = args.dx, args.dresidual
        height, width = args.height, args.width
        scale, bias = scale_and_bias(args, c)
        invstd = get_f32(args.invstd, c)
        a, k = splat(scale * mean_dz), splat(scale * invstd * mean_dz_xhat)
        constants = (splat(get_f32(args.mean, c)), splat(scale), splat(bias), a, k)
        here = p * height * width * size
        there = gradient(args, grad, p, scratch, height, width)
        out = (dx + here, dres + here if dres != 0 else 0, streamed)
        for unit in range(units(height, width)):
            walk(unit, x + here, res + here, there, height, width, constants, out, (0, 0))

    return prepare, plane_apply


@takes(Arguments)
def planes_reduce(storage, activation, residual, pool):
    """Σdz and Σdz·(x - mean) of each part."""
    prepare, group_reduce = _group_reduce(storage, activation, residual, pool)

    def kernel(args, part):
        images, channels, sums = args.images, args.channels, args.sums
        image_parts, channel_parts = args.image_parts, args.channel_parts
        mine, span = part // channel_parts, part % channel_parts
        start, stop = cut(images, image_parts, mine), cut(images, image_parts, mine + 1)
        begins, scratch, group = accounts(args, part), prepare(args, part), args.group
        end = cut(channels, channel_parts, span + 1)
        for c0 in range(cut(channels, channel_parts, span), end, group):
            c1 = min(c0 + group, end)
            group_reduce(args, begins, c0, c1, start, stop, scratch)
            for c in range(c0, c1):
                account = begins + (c - c0) * ACCOUNT
                put_f64(sums, 2 * mine * channels + c, get_f64(account, TOTAL))
                put_f64(sums, (2 * mine + 1) * channels + c, get_f64(account, SQUARES))

    return kernel


@takes(Arguments)
def planes_apply(storage, activation, residual, pool):
    """Every plane by itself, with the means given."""
    prepare, plane_apply = _plane_apply(storage, activation, residual, pool)

    def kernel(args, part):
        scratch = prepare(args, part)
        channels, parts = args.channels, args.image_parts * args.channel_parts
        mean_dz, mean_dz_xhat = args.mean_dz, args.mean_dz_xhat
        planes = args.images * channels
        for p in range(cut(planes, parts, part), cut(planes, parts, part + 1)):
            c = p % channels
            grad = args.grad
            plane_apply(args, grad, p, c, get_f32(mean_dz, c), get_f32(mean_dz_xhat, c), scratch)
        if args.stream != 0:
            fence()

    return kernel


@takes(Arguments)
def planes_backward(storage, activation, residual, pool):
    """Reduce and apply of one group of channels after the other, the statistics differentiated.

    A residual is one that wants its gradient: the second pass takes dz from there.
    """
    prepare, group_reduce = _group_reduce(storage, activation, residual, pool)
    if residual:
        _, plane_apply = _plane_apply(storage, ACTIVATIONS[None], False, False)
    else:
        _, plane_apply = _plane_apply(storage, activation, False, pool)

    def kernel(args, part):
        images, channels, parts = args.images, args.channels, args.channel_parts
        dweight, dbias, invstd = args.dweight, args.dbias, args.invstd
        count = float(images * args.height * args.width)
        grad = args.dresidual if residual else args.grad
        begins, scratch, group = accounts(args, part), prepare(args, part), args.group
        end = cut(channels, parts, part + 1)
        for c0 in range(cut(channels, parts, part), end, group):
            c1 = min(c0 + group, end)
            group_reduce(args, begins, c0, c1, 0, images, scratch)
            for c in range(c0, c1):
                account = begins + (c - c0) * ACCOUNT
                put_f32(dbias, c, get_f64(account, TOTAL))
                put_f32(dweight, c, get_f64(account, SQUARES) * get_f32(invstd, c))
            for image in range(images):
                for c in range(c0, c1):
                    mean_dz, mean_dz_xhat = get_f32(dbias, c) / count, get_f32(dweight, c) / count
                    plane_apply(args, grad, image * channels + c, c, mean_dz, mean_dz_xhat, scratch)
        if args.stream != 0:
            fence()

    return kernel
