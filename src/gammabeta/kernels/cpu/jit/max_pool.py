"""Max pooling behind the activation: the greatest of each window forward, and its gradient's way back.

A window is ``kernel`` × ``kernel`` elements, one starts every ``stride``; on each side of the plane
``padding`` are outside of it. Which element was the greatest (as PyTorch has it: the first of equal ones, and
NaN above all) is kept as a byte, its *code* ``row * kernel + column`` within the window.

Nothing but a few rows of activated values is ever stored: they go round a *ring* in working memory. In a
contiguous plane neighbouring windows are ``stride`` elements apart, and sixteen of them are looked at
together: so a row lies in the ring taken apart into ``stride`` *phases*, whose elements are neighbours there.
"""

from ..arguments import ACCOUNT, MARGIN
from .groups import accounts
from .loads import byte, float32, get_f32, put_f32
from .simd import even_lanes, inlined, mixed_high, mixed_low, odd_lanes, select, splat

_load, _store, _store_some = float32.load, float32.store, float32.store_some
_load_codes, _store_codes = byte.load_some, byte.store_some
_LEAST = -float("inf")


def window_of(pool):
    """``(kernel, stride, padding)`` of a maker's ``pool``; None for no pooling and for the mean of 2x2."""
    return pool if isinstance(pool, tuple) else None


def out_plane_of(pool):
    """The elements of an output's plane, as a function of height and width."""
    if window_of(pool) is not None:
        _, side = along(pool)

        @inlined
        def out_plane(height, width):
            return side(height) * side(width)

    elif pool:

        @inlined
        def out_plane(height, width):
            return (height // 2) * (width // 2)

    else:

        @inlined
        def out_plane(height, width):
            return height * width

    return out_plane


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


# --- contiguous -------------------------------------------------------------------------------------------


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


@inlined
def _fill(address, count, value):
    for i in range(0, count, 16):
        _store(address, i, splat(value))


def pool_plane_of(storage, window, one, one_some):
    """Activate a plane, row by row, and write the greatest of each window and, if wanted, its code.

    ``one`` and ``one_some`` give activated values (``pointwise.forward``).
    """
    kernel, stride, padding = window
    span, side = along(window)
    take_apart = _take_apart_of(stride, padding)
    store_some = storage.store_some

    @inlined
    def activate(x, res, at, line, width, m, s, b):
        for c in range(0, width, 16):
            if c + 16 <= width:
                _store(line, c, one(x, res, at + c, m, s, b))
            else:
                _store_some(line, c, one_some(x, res, at + c, width - c, m, s, b), width - c)

    @inlined
    def greatest(ring, row_bytes, phase, first, stop, top, q):
        best, code = splat(_LEAST), splat(0.0)
        for r in range(first, stop):
            row = ring + r % kernel * row_bytes
            place = float((r - top) * kernel)
            for k in range(kernel):
                y = _load(row, k % stride * phase + q + k // stride)
                more = (y > best) | (y != y)
                best = select(more, y, best)
                code = select(more, splat(place + float(k)), code)
        return best, code

    @inlined
    def prepare(args, part):
        """Fill what is outside of the plane; return the working memory."""
        scratch = accounts(args, part) + args.group * ACCOUNT
        _fill(scratch, kernel * stride * args.phase + args.width + 32, _LEAST)
        return scratch

    @inlined
    def pool_plane(x, res, out, codes, scratch, phase, height, width, m, s, b):
        row_bytes = 4 * stride * phase
        line, columns, done = scratch + kernel * row_bytes, side(width), 0
        for i in range(side(height)):
            first, stop = span(i, height)
            for r in range(max(done, first), stop):
                activate(x, res, r * width, line, width, m, s, b)
                take_apart(line, scratch + r % kernel * row_bytes, phase, width)
            done = stop
            for q in range(0, columns, 16):
                y, code = greatest(scratch, row_bytes, phase, first, stop, i * stride - padding, q)
                store_some(out, i * columns + q, y, min(16, columns - q))
                if codes != 0:
                    _store_codes(codes, i * columns + q, code, min(16, columns - q))

    return prepare, pool_plane


def spread_plane_of(storage, window):
    """The gradient of a plane's activated values, float32, from that of its windows."""
    kernel, stride, padding = window
    span, side = along(window)
    put_together = _put_together_of(*window)
    load_some = storage.load_some

    @inlined
    def add(ring, row_bytes, piece, first, stop, top, q, g, code):
        # A piece for each column: additions to one row a few elements apart would wait for each other.
        for r in range(first, stop):
            row = ring + r % kernel * row_bytes
            place = float((r - top) * kernel)
            for k in range(kernel):
                at = k * piece + MARGIN + q
                mine = select(code == splat(place + float(k)), g, splat(0.0))
                _store(row, at, _load(row, at) + mine)

    @inlined
    def prepare(args, part):
        """Clear the ring; return the working memory."""
        scratch = accounts(args, part) + args.group * ACCOUNT
        _fill(scratch, kernel * kernel * (args.phase + MARGIN), 0.0)
        return scratch

    @inlined
    def spread_plane(args, grad, at, scratch, height, width):
        """Return the address of the plane; ``at`` is where its windows begin in the tensor ``grad``."""
        piece = args.phase + MARGIN
        row_bytes = 4 * kernel * piece
        plane, codes = scratch + kernel * row_bytes, args.codes
        rows, columns, done = side(height), side(width), 0
        for i in range(rows):
            first, stop = span(i, height)
            for q in range(0, columns, 16):
                count, here = min(16, columns - q), at + i * columns + q
                g, code = load_some(grad, here, count), _load_codes(codes, here, count)
                add(scratch, row_bytes, piece, first, stop, i * stride - padding, q, g, code)
            complete = min(height, (i + 1) * stride - padding) if i + 1 < rows else height
            for r in range(done, complete):
                row = scratch + r % kernel * row_bytes
                put_together(row, plane + 4 * r * width, piece, width)
                _fill(row, kernel * piece, 0.0)
            done = max(done, complete)
        return plane

    return prepare, spread_plane


# --- channels_last ----------------------------------------------------------------------------------------


def pool_row_of(storage, window):
    """The greatest of each window of a row of windows, and their codes, from a ring of activated rows."""
    kernel, stride, padding = window
    span, side = along(window)
    store, store_some = storage.store, storage.store_some

    @inlined
    def greatest(ring, row_bytes, width, channels, first, stop, top, left, v):
        best, code = splat(_LEAST), splat(0.0)
        for r in range(first, stop):
            row = ring + r % kernel * row_bytes
            place = float((r - top) * kernel)
            for k in range(kernel):
                c = left + k
                if c >= 0 and c < width:
                    y = _load(row, c * channels + v)
                    more = (y > best) | (y != y)
                    best = select(more, y, best)
                    code = select(more, splat(place + float(k)), code)
        return best, code

    @inlined
    def pool_row(ring, row_bytes, out, codes, at, i, height, width, channels):
        """Row ``i`` of the windows, whose first is element ``at`` of ``out`` and of ``codes``."""
        first, stop = span(i, height)
        top = i * stride - padding
        for q in range(side(width)):
            left = q * stride - padding
            for v in range(0, channels, 16):
                y, code = greatest(ring, row_bytes, width, channels, first, stop, top, left, v)
                here, count = at + q * channels + v, channels - v
                if count >= 16:
                    store(out, here, y)
                else:
                    store_some(out, here, y, count)
                if codes != 0:
                    _store_codes(codes, here, code, min(16, count))

    return pool_row


def spread_row_of(storage, window):
    """The gradient of a row of activated pixels, a float32 line, from that of the windows over it."""
    kernel, stride, padding = window
    _, side = along(window)
    load_some = storage.load_some

    @inlined
    def spread_row(args, grad, line, image, row, height, width, channels):
        """Fill the line for one row of an image."""
        _fill(line, width * channels, 0.0)
        codes, columns = args.codes, side(width)
        first = max(0, (row + padding - kernel + stride) // stride)
        for i in range(first, min(side(height), (row + padding) // stride + 1)):
            place = float((row + padding - i * stride) * kernel)
            for q in range(columns):
                left = q * stride - padding
                at = ((image * side(height) + i) * columns + q) * channels
                for v in range(0, channels, 16):
                    count = min(16, channels - v)
                    g, code = load_some(grad, at + v, count), _load_codes(codes, at + v, count)
                    for k in range(kernel):
                        c = left + k
                        if c >= 0 and c < width:
                            mine = select(code == splat(place + float(k)), g, splat(0.0))
                            _store(line, c * channels + v, _load(line, c * channels + v) + mine)

    return spread_row
