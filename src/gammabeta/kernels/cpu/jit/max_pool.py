"""Max pooling behind the activation: the greatest of each window forward, and its gradient's way back.

A window is ``kernel`` × ``kernel`` elements, one starts every ``stride``; on each side of the plane
``padding`` are outside of it. Which element was the greatest (as PyTorch has it: the first of equal ones, and
NaN above all) is kept as a byte, its *code* ``row * kernel + column`` within the window.

Nothing but a few rows of activated values is ever stored: they go round a *ring* in working memory. In a
contiguous plane neighbouring windows are ``stride`` elements apart, and sixteen of them are looked at
together: so a row lies in the ring taken apart into ``stride`` *phases*, whose elements are neighbours there.
"""

from ..arguments import ACCUMULATOR, MARGIN
from .loads import byte, float32, get_f32, put_f32
from .simd import even_lanes, inlined, mixed_high, mixed_low, odd_lanes, select, splat
from .tables import clear, fill, memory

_load, _store, _store_some = float32.load, float32.store, float32.store_some
_load_codes, _store_codes = byte.load_some, byte.store_some
_LEAST = -float("inf")


# --- both layouts -----------------------------------------------------------------------------------------


def window_of(pool):
    """``(kernel, stride, padding)`` of a maker's ``pool``; None for no pooling and for the mean of 2x2."""
    return pool if isinstance(pool, tuple) else None


def along(window):
    """Where windows lie along one side of a plane: ``span`` of one of them, and ``side``, their number."""
    kernel, stride, padding = window

    @inlined
    def side(length):
        """How many there are."""
        return (length + 2 * padding - kernel) // stride + 1

    @inlined
    def span(window, length):
        """The elements of one that are inside, from the first to behind the last."""
        start = window * stride - padding
        return max(0, start), min(length, start + kernel)

    return span, side


def out_plane_of(pool):
    """The elements of an output's plane."""
    if window_of(pool) is not None:
        _, side = along(pool)
    else:
        shrink = 2 if pool else 1

        @inlined
        def side(length):
            return length // shrink

    @inlined
    def out_plane(args):
        return side(args.height) * side(args.width)

    return out_plane


@inlined
def greater(y, code, best, best_code):
    """Lane by lane the greater of ``best`` and the next element, NaN above all, and its code."""
    more = (y > best) | (y != y)
    return select(more, y, best), select(more, splat(code), best_code)


# --- contiguous, forward ----------------------------------------------------------------------------------


@inlined
def plane_memory(args, part):
    """A part's working memory behind the accumulators of its channels."""
    return memory(args, part) + args.group * ACCUMULATOR


def pool_plane_of(storage, window, whole, some):
    """Activate a plane, row by row, and write the greatest of each window and, if wanted, its code.

    ``whole`` and ``some`` give activated values (``pointwise.forward_of``). Before it, what prepares the
    working memory of a part and gives its address: the ring, and behind it one row.
    """
    kernel, stride, padding = window
    span, side = along(window)
    take_apart, greatest = _take_apart_of(stride, padding), _greatest_of_plane(window)
    store_some = storage.store_some

    @inlined
    def prepare(args, part):
        """Fill what is outside of the plane."""
        ring = plane_memory(args, part)
        fill(ring, kernel * stride * args.phase + args.width + 32, _LEAST)
        return ring

    @inlined
    def activate(run, at, line, width, affine):
        """A row of the plane, from element ``at`` on."""
        for c in range(0, width, 16):
            if c + 16 <= width:
                _store(line, c, whole(run, at + c, affine))
            else:
                _store_some(line, c, some(run, at + c, width - c, affine), width - c)

    @inlined
    def pool_plane(args, run, codes, ring, affine):
        height, width, row_bytes = args.height, args.width, 4 * stride * args.phase
        line, columns, done = ring + kernel * row_bytes, side(width), 0
        for i in range(side(height)):
            first, stop = span(i, height)
            for r in range(max(done, first), stop):
                activate(run, r * width, line, width, affine)
                take_apart(line, ring + r % kernel * row_bytes, args.phase, width)
            done = stop
            for q in range(0, columns, 16):
                y, code = greatest(args, ring, i, q)
                store_some(run.out, i * columns + q, y, min(16, columns - q))
                if codes != 0:
                    _store_codes(codes, i * columns + q, code, min(16, columns - q))

    return prepare, pool_plane


def _greatest_of_plane(window):
    """The greatest of sixteen windows of row ``i``, from the ``q``th on, and their codes."""
    kernel, stride, padding = window
    span, _ = along(window)

    @inlined
    def greatest(args, ring, i, q):
        best, code = splat(_LEAST), splat(0.0)
        first, stop = span(i, args.height)
        for r in range(first, stop):
            row = ring + r % kernel * 4 * stride * args.phase
            place = float((r - (i * stride - padding)) * kernel)
            for k in range(kernel):
                y = _load(row, k % stride * args.phase + q + k // stride)
                best, code = greater(y, place + float(k), best, code)
        return best, code

    return greatest


def _take_apart_of(stride, padding):
    """A row into its phases."""

    @inlined
    def take_apart(line, row, phase, width):
        if stride == 1:
            for c in range(0, width, 16):
                _store(row, c + padding, _load(line, c))
        elif stride == 2:
            even, odd = row + 4 * (padding % 2) * phase, row + 4 * ((padding + 1) % 2) * phase
            for c in range(0, width, 32):
                a, b = _load(line, c), _load(line, c + 16)
                _store(even, (c + padding) // 2, even_lanes(a, b))
                _store(odd, (c + 1 + padding) // 2, odd_lanes(a, b))
        else:
            for c in range(width):
                at = c + padding
                put_f32(row, at % stride * phase + at // stride, get_f32(line, c))

    return take_apart


# --- contiguous, backward ---------------------------------------------------------------------------------


def spread_plane_of(storage, window):
    """The gradient of a plane's activated values, float32, from that of its windows.

    Before it, what prepares the working memory of a part and gives its address: the ring, and behind it the
    plane.
    """
    kernel, stride, padding = window
    _, side = along(window)
    put_together, add_shares = _put_together_of(*window), _add_shares_of(window)
    load_some = storage.load_some

    @inlined
    def prepare(args, part):
        """Clear the ring."""
        ring = plane_memory(args, part)
        clear(ring, kernel * kernel * (args.phase + MARGIN))
        return ring

    @inlined
    def spread_plane(args, p, ring):
        """Return the address of the gradient of plane ``p``."""
        height, width, piece = args.height, args.width, args.phase + MARGIN
        row_bytes = 4 * kernel * piece
        rows, columns, done = side(height), side(width), 0
        plane = ring + kernel * row_bytes
        for i in range(rows):
            for q in range(0, columns, 16):
                count, here = min(16, columns - q), (p * rows + i) * columns + q
                g, code = load_some(args.grad, here, count), _load_codes(args.codes, here, count)
                add_shares(args, ring, i, q, g, code)
            complete = min(height, (i + 1) * stride - padding) if i + 1 < rows else height
            for r in range(done, complete):
                row = ring + r % kernel * row_bytes
                put_together(row, plane + 4 * r * width, piece, width)
                clear(row, kernel * piece)
            done = max(done, complete)
        return plane

    return prepare, spread_plane


def _add_shares_of(window):
    """Give the gradients of sixteen windows of row ``i``, from ``q`` on, to the elements they came from."""
    kernel, stride, padding = window
    span, _ = along(window)

    @inlined
    def add_shares(args, ring, i, q, g, code):
        # A piece for each column: additions to one row a few elements apart would wait for each other.
        piece = args.phase + MARGIN
        first, stop = span(i, args.height)
        for r in range(first, stop):
            row = ring + r % kernel * 4 * kernel * piece
            place = float((r - (i * stride - padding)) * kernel)
            for k in range(kernel):
                at = k * piece + MARGIN + q
                mine = select(code == splat(place + float(k)), g, splat(0.0))
                _store(row, at, _load(row, at) + mine)

    return add_shares


def _put_together_of(kernel, stride, padding):
    """A row of gradients out of the shares that the windows' columns have in it.

    Column k of window q is element ``q * stride - padding + k``; its share is element q of the kth piece.
    """

    @inlined
    def shares(row, piece, phase, at):
        """Sixteen elements of a phase, from ``at`` on."""
        found = splat(0.0)
        for k in range(kernel):
            if k % stride == phase:
                found = found + _load(row, k * piece + MARGIN + at - k // stride)
        return found

    @inlined
    def put_together(row, line, piece, width):
        if stride == 1:
            for c in range(0, width, 16):
                _store(line, c, shares(row, piece, 0, c + padding))
        elif stride == 2:
            for c in range(0, width, 32):
                a = shares(row, piece, padding % 2, (c + padding) // 2)
                b = shares(row, piece, (padding + 1) % 2, (c + 1 + padding) // 2)
                _store(line, c, mixed_low(a, b))
                _store(line, c + 16, mixed_high(a, b))
        else:
            for c in range(width):
                at, found = c + padding, 0.0
                for k in range(kernel):
                    if k % stride == at % stride:
                        found += get_f32(row, k * piece + MARGIN + at // stride - k // stride)
                put_f32(line, c, found)

    return put_together


# --- channels_last ----------------------------------------------------------------------------------------


@inlined
def ring_row_bytes(args):
    """The bytes of a row in the ring, with room for its last vector."""
    return 4 * args.width * args.channels + 64


def pool_row_of(storage, window):
    """The greatest of each window of row ``i``, and their codes, from a ring of activated rows.

    Element ``at`` of ``out`` and of ``codes`` belongs to the first.
    """
    _, stride, padding = window
    _, side = along(window)
    store, store_some, greatest = storage.store, storage.store_some, _greatest_of_row(window)

    @inlined
    def pool_row(args, ring, at, i):
        channels, out, codes = args.channels, args.out, args.codes
        for q in range(side(args.width)):
            for v in range(0, channels, 16):
                y, code = greatest(args, ring, i, q * stride - padding, v)
                here, count = at + q * channels + v, channels - v
                if count >= 16:
                    store(out, here, y)
                else:
                    store_some(out, here, y, count)
                if codes != 0:
                    _store_codes(codes, here, code, min(16, count))

    return pool_row


def _greatest_of_row(window):
    """The greatest of a window of row ``i`` from column ``left`` on, in sixteen channels from ``v`` on."""
    kernel, stride, padding = window
    span, _ = along(window)

    @inlined
    def greatest(args, ring, i, left, v):
        best, code = splat(_LEAST), splat(0.0)
        width, channels = args.width, args.channels
        first, stop = span(i, args.height)
        for r in range(first, stop):
            row = ring + r % kernel * ring_row_bytes(args)
            place = float((r - (i * stride - padding)) * kernel)
            for k in range(kernel):
                c = left + k
                if c >= 0 and c < width:
                    y = _load(row, c * channels + v)
                    best, code = greater(y, place + float(k), best, code)
        return best, code

    return greatest


def spread_row_of(storage, window):
    """The gradient of a row of activated pixels, a float32 line, from that of the windows over it."""
    kernel, stride, padding = window
    _, side = along(window)
    load_some = storage.load_some

    @inlined
    def add_shares(args, line, left, v, place, g, code):
        """Give sixteen channels of a window's gradient to the pixels of this row that they came from."""
        width, channels = args.width, args.channels
        for k in range(kernel):
            c = left + k
            if c >= 0 and c < width:
                at = c * channels + v
                mine = select(code == splat(place + float(k)), g, splat(0.0))
                _store(line, at, _load(line, at) + mine)

    @inlined
    def spread_row(args, line, image, row):
        channels, rows, columns = args.channels, side(args.height), side(args.width)
        grad, codes = args.grad, args.codes
        clear(line, args.width * channels)
        first = max(0, (row + padding - kernel + stride) // stride)
        for i in range(first, min(rows, (row + padding) // stride + 1)):
            place = float((row + padding - i * stride) * kernel)
            for q in range(columns):
                at = ((image * rows + i) * columns + q) * channels
                for v in range(0, channels, 16):
                    count = min(16, channels - v)
                    g, code = load_some(grad, at + v, count), _load_codes(codes, at + v, count)
                    add_shares(args, line, q * stride - padding, v, place, g, code)

    return spread_row
