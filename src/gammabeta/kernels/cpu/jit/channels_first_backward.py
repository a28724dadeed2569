"""Contiguous tensors, backward: for each image and channel a plane of S values.

Maths: see ``gammabeta.kernels``. Memory moved, in units of x: reduce reads 2 (1¼ with pooling, 1 more with
a residual) and writes 1 where the residual wants its gradient, which is dz; apply reads 2 and writes 1; the
two in one, group of channels by group, read everything from memory once where the group's planes fit in a
core's cache. Groups are those of ``channels_first``.
"""

from ..arguments import ACCUMULATOR, NEAR, Arguments
from .activations import ACTIVATIONS
from .channels_first import (
    PIECE,
    READ_AHEAD,
    WRITE_AHEAD,
    fetch_next,
    no_memory,
    own_channels,
    own_planes,
    pieces_of,
)
from .loads import fence, float32, get_f32, get_f64, prefetch, prefetch_write, put_f32, put_f64
from .max_pool import out_plane_of, spread_plane_of, window_of
from .pointwise import affine_backward_of, affine_of, backward_run, dx_of, dz_of
from .record import takes
from .simd import fma, inlined, mixed_high, mixed_low, splat, total
from .tables import cut, memory

TOTAL, SQUARES = (
    18,
    19,
)  # where an accumulator has its float64 totals, behind sixteen lanes of two float32 sums
BLOCK = 4096  # values that may be summed in float32 before a flush

_load, _store = float32.load, float32.store

# --- accumulators -----------------------------------------------------------------------------------------


@inlined
def reset(accumulator):
    """All sums zero."""
    put_sums(accumulator, splat(0.0), splat(0.0))
    put_f64(accumulator, TOTAL, 0.0)
    put_f64(accumulator, SQUARES, 0.0)


@inlined
def sums_of(accumulator):
    """The two float32 sums."""
    return _load(accumulator, 0), _load(accumulator, 16)


@inlined
def put_sums(accumulator, one, two):
    """Keep the two float32 sums."""
    _store(accumulator, 0, one)
    _store(accumulator, 16, two)


@inlined
def add_totals(accumulator, one, two):
    """Add to the float64 totals."""
    put_f64(accumulator, TOTAL, get_f64(accumulator, TOTAL) + one)
    put_f64(accumulator, SQUARES, get_f64(accumulator, SQUARES) + two)


@inlined
def store_totals(args, part, accumulator, c):
    """Write the totals of a channel as the sums of an image part."""
    put_f64(args.sums, 2 * part * args.channels + c, get_f64(accumulator, TOTAL))
    put_f64(args.sums, (2 * part + 1) * args.channels + c, get_f64(accumulator, SQUARES))


# --- the gradient, and a walk over a plane ----------------------------------------------------------------


def _gradient_of(storage, pool):
    """What prepares a part's working memory, and what gives the address of the gradient of plane ``p``.

    It is where the caller has it, but for windows: theirs is spread in working memory, as float32.
    """
    window, size, out_plane = window_of(pool), storage.size, out_plane_of(pool)
    if window is not None:
        prepare, spread_plane = spread_plane_of(storage, window)

        @inlined
        def gradient(args, grad, p, scratch):
            return spread_plane(args, p, scratch)

    else:
        prepare = no_memory

        @inlined
        def gradient(args, grad, p, scratch):
            return grad + p * out_plane(args) * size

    return prepare, gradient


def _walk_of(storage, activation, residual, pool, visit):
    """A walk over one unit of a plane, and the number of units.

    ``visit(run, at, count, centred, dz, affine, sums)`` is handed sixteen elements, or ``count``, and returns
    the sums with what it added. There are two such, so that additions need not wait for each other; the
    walk returns both and the number of elements.
    """
    if pool and window_of(pool) is None:
        return _walk_row_pairs(storage, activation, residual, visit)
    grads = float32 if pool else storage
    return walk_pieces(walk_of(storage, grads, dz_of(storage, activation, residual), residual, visit))


def walk_of(storage, grads, dz, residual, visit):
    """A walk over the elements ``at`` to ``stop`` of a run; ``grads`` says how its gradient is stored."""
    size, load, load_some, (whole, some) = storage.size, grads.load, grads.load_some, dz

    @inlined
    def vector(run, at, affine, sums):
        prefetch(run.x + at * size + READ_AHEAD)
        prefetch(run.grad + at * size + READ_AHEAD)
        if residual:
            prefetch(run.residual + at * size + READ_AHEAD)
        centred, dz = whole(run, at, load(run.grad, at), affine)
        return visit(run, at, 16, centred, dz, affine, sums)

    @inlined
    def walk(run, at, stop, affine, sums):
        one, two = sums
        while at + 32 <= stop:
            one = vector(run, at, affine, one)
            two = vector(run, at + 16, affine, two)
            at += 32
        if at + 16 <= stop:
            one = vector(run, at, affine, one)
            at += 16
        if at < stop:
            left = stop - at
            centred, dz = some(run, at, left, load_some(run.grad, at, left), affine)
            two = visit(run, at, left, centred, dz, affine, two)
        return one, two

    return walk


def walk_pieces(walk):
    """A walk over one unit of a plane, which is a piece of it, and the number of units."""

    @inlined
    def walk_piece(args, unit, run, affine, sums):
        at, stop = unit * PIECE, min((unit + 1) * PIECE, args.height * args.width)
        return walk(run, at, stop, affine, sums), stop - at

    return walk_piece, pieces_of


def _walk_row_pairs(storage, activation, residual, visit):
    """With the mean of 2x2 a unit is a pair of rows, whose gradient is taken apart lane by lane."""
    load_some, (_, some) = storage.load_some, dz_of(storage, activation, residual)

    @inlined
    def vector(run, at, count, g, affine, sums):
        centred, dz = some(run, at, count, g, affine)
        return visit(run, at, count, centred, dz, affine, sums)

    @inlined
    def walk(args, unit, run, affine, sums):
        width, pairs, rows = args.width, args.width // 2, min(2, args.height - 2 * unit)
        one, two = sums
        for i in range(0, width, 32):
            there = max(0, min(16, pairs - i // 2)) if rows == 2 else 0
            g = load_some(run.grad, unit * pairs + i // 2, there) * splat(0.25)
            for row in range(rows):
                at = (2 * unit + row) * width + i
                one = vector(run, at, min(16, width - i), mixed_low(g, g), affine, one)
                if width > i + 16:
                    two = vector(run, at + 16, min(16, width - i - 16), mixed_high(g, g), affine, two)
        return (one, two), rows * width

    @inlined
    def units(args):
        return (args.height + 1) // 2

    return walk, units


# --- reduce -----------------------------------------------------------------------------------------------


@takes(Arguments)
def channels_first_reduce(storage, activation, residual, pool):
    """Σdz and Σdz·(x - mean) of each part."""
    prepare, reduce_group = _reduce_of(storage, activation, residual, pool)

    def kernel(args, part):
        image_part, start, stop, group = own_channels(args, part)
        accumulators, scratch, parts = memory(args, part), prepare(args, part), args.image_parts
        images = cut(args.images, parts, image_part), cut(args.images, parts, image_part + 1)
        for c0 in range(start, stop, group):
            c1 = min(c0 + group, stop)
            reduce_group(args, accumulators, c0, c1, images, scratch)
            for c in range(c0, c1):
                store_totals(args, image_part, accumulators + (c - c0) * ACCUMULATOR, c)

    return kernel


def _reduce_of(storage, activation, residual, pool):
    """What prepares the working memory of a part, and ``reduce_group_of``."""
    prepare, gradient = _gradient_of(storage, pool)
    walk = _walk_of(storage, activation, residual, pool, sums_added(storage, residual))
    return prepare, reduce_group_of(storage, pool, walk, _run_of(storage, gradient))


def _run_of(storage, gradient):
    """The run of the plane ``p``, whose gradient is in the tensor ``grad``."""
    size = storage.size

    @inlined
    def run_of(args, p, grad, scratch):
        return backward_run(args, p * args.height * args.width * size, gradient(args, grad, p, scratch))

    return run_of


def reduce_group_of(storage, pool, walk, run_of):
    """Σdz and Σdz·(x - mean) of channels ``c0`` to ``c1`` over some images, as totals of their accumulators.

    Where the residual wants its gradient dz is written too, for the residual and for the second pass.
    """
    reduce_plane = _reduce_plane_of(walk, run_of)
    size, out_plane = storage.size, out_plane_of(pool)

    @inlined
    def fetch(args, p, image, group):
        """Ask for what this plane's successor reads."""
        images, channels = args.images, args.channels
        step, grad_step = args.height * args.width * size, out_plane(args) * size
        fetch_next(args.x + p * step, image, images, channels * step, group * step, step)
        grad = args.grad + p * grad_step
        fetch_next(grad, image, images, channels * grad_step, group * grad_step, grad_step)

    @inlined
    def reduce_group(args, accumulators, c0, c1, images, scratch):
        near = args.height * args.width <= NEAR
        for c in range(c0, c1):
            reset(accumulators + (c - c0) * ACCUMULATOR)
        before = 0
        for image in range(images[0], images[1]):
            pending = before
            for c in range(c0, c1):
                p = image * args.channels + c
                if near:
                    fetch(args, p, image, c1 - c0)
                accumulator = accumulators + (c - c0) * ACCUMULATOR
                before = reduce_plane(args, p, c, accumulator, pending, scratch)
        for c in range(c0, c1):
            accumulator = accumulators + (c - c0) * ACCUMULATOR
            one, two = sums_of(accumulator)
            add_totals(accumulator, total(one), total(two))

    return reduce_group


def sums_added(storage, residual):
    """A visit that adds to the sums Σdz and Σdz·(x - mean), and writes dz where the residual wants it."""
    store, store_some = storage.store, storage.store_some

    @inlined
    def add(run, at, count, centred, dz, affine, sums):
        if residual and run.dresidual != 0:
            if count == 16:
                store(run.dresidual, at, dz)
            else:
                store_some(run.dresidual, at, dz, count)
        return sums[0] + dz, fma(dz, centred, sums[1])

    return add


def _reduce_plane_of(walk, run_of):
    """Add a plane to the accumulator of its channel; return the values that were not flushed yet."""
    walk_unit, units = walk

    @inlined
    def reduce_plane(args, p, c, accumulator, pending, scratch):
        affine, zeros = affine_of(args, c), (splat(0.0), splat(0.0))
        run, sums = run_of(args, p, args.grad, scratch), (sums_of(accumulator), zeros)
        for unit in range(units(args)):
            sums, done = walk_unit(args, unit, run, affine, sums)
            pending += done
            if pending >= BLOCK:
                (s0, q0), (s1, q1) = sums
                add_totals(accumulator, total(s0) + total(s1), total(q0) + total(q1))
                sums = (zeros, zeros)
                pending = 0
        put_sums(accumulator, sums[0][0] + sums[1][0], sums[0][1] + sums[1][1])
        return pending

    return reduce_plane


# --- apply ------------------------------------------------------------------------------------------------


@takes(Arguments)
def channels_first_apply(storage, activation, residual, pool):
    """Every plane by itself, with the means given."""
    prepare, apply_plane = _apply_of(storage, activation, residual, pool)

    def kernel(args, part):
        scratch, (start, stop) = prepare(args, part), own_planes(args, part)
        for p in range(start, stop):
            c = p % args.channels
            affine = affine_backward_of(args, c, get_f32(args.mean_dz, c), get_f32(args.mean_dz_xhat, c))
            apply_plane(args, args.grad, p, affine, scratch)
        if args.stream != 0:
            fence()

    return kernel


def dx_written(storage, residual, value=dx_of):
    """A visit that writes ``dx`` as ``value(run, at, count, centred, dz, affine)``, and dz where wanted."""
    store, store_some, stream, size = storage.store, storage.store_some, storage.stream, storage.size

    @inlined
    def put(run, at, count, centred, dz, affine, sums):
        y = value(run, at, count, centred, dz, affine)
        if count == 16 and run.stream != 0:
            stream(run.dx, at, y)
        elif count == 16:
            prefetch_write(run.dx + at * size + WRITE_AHEAD)
            store(run.dx, at, y)
        else:
            store_some(run.dx, at, y, count)
        if residual and run.dresidual != 0:
            store_some(run.dresidual, at, dz, count)
        return sums

    return put


def _apply_of(storage, activation, residual, pool):
    """What prepares the working memory of a part, and ``apply_plane_of``."""
    prepare, gradient = _gradient_of(storage, pool)
    walk = _walk_of(storage, activation, residual, pool, dx_written(storage, residual))
    return prepare, apply_plane_of(walk, _run_of(storage, gradient))


def apply_plane_of(walk, run_of):
    """``dx = scale * (dz - mean_dz - xhat * mean_dz_xhat)`` over one plane, and ``dz`` where it is wanted."""
    walk_unit, units = walk

    @inlined
    def apply_plane(args, grad, p, affine, scratch):
        run = run_of(args, p, grad, scratch)
        for unit in range(units(args)):
            walk_unit(args, unit, run, affine, (0, 0))

    return apply_plane


# --- both -------------------------------------------------------------------------------------------------


@takes(Arguments)
def channels_first_backward(storage, activation, residual, pool):
    """Reduce and apply of one group of channels after the other, the statistics differentiated.

    A residual is one that wants its gradient: the second pass takes dz from there.
    """
    reduce = _reduce_of(storage, activation, residual, pool)
    if residual:
        _, apply_plane = _apply_of(storage, ACTIVATIONS[None], False, False)
    else:
        _, apply_plane = _apply_of(storage, activation, False, pool)

    @inlined
    def count(args):
        return args.images * args.height * args.width

    return backward_of(residual, reduce, apply_plane, count)


def backward_of(residual, reduce, apply_plane, count_of):
    """The kernel that reduces a group of channels, each of ``count_of(args)`` values, and then applies."""
    prepare, reduce_group = reduce

    def kernel(args, part):
        _, start, stop, group = own_channels(args, part)
        count = float(count_of(args))
        grad = args.dresidual if residual else args.grad
        accumulators, scratch = memory(args, part), prepare(args, part)
        for c0 in range(start, stop, group):
            c1 = min(c0 + group, stop)
            reduce_group(args, accumulators, c0, c1, (0, args.images), scratch)
            for c in range(c0, c1):
                found = accumulators + (c - c0) * ACCUMULATOR
                put_f32(args.dbias, c, get_f64(found, TOTAL))
                put_f32(args.dweight, c, get_f64(found, SQUARES) * get_f32(args.invstd, c))
            for image in range(args.images):
                for c in range(c0, c1):
                    mean_dz, mean_dz_xhat = get_f32(args.dbias, c) / count, get_f32(args.dweight, c) / count
                    affine = affine_backward_of(args, c, mean_dz, mean_dz_xhat)
                    apply_plane(args, grad, image * args.channels + c, affine, scratch)
        if args.stream != 0:
            fence()

    return kernel
