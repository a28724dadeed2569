"""What all kernels of convolutions are made of: a product of small matrices."""

from typing import NamedTuple

from llvmlite import ir
from numba.core import cgutils, types

from ...cpu.jit.simd import F32, I64, LANES, PAIRS, V32, call_intrinsic, intrinsic, splat_value

_BYTES = 4 * LANES


class Patches(NamedTuple):
    """The left matrix: value t of row j is float32 at ``address + rows[j] + taps[t]``, t below ``values``."""

    address: int
    rows: int  # the address of int64, in bytes
    taps: int  # the same
    values: int  # t's, at least 1


class Rows(NamedTuple):
    """Rows of sums in memory, ``pitch`` bytes apart; 0: the same row each time."""

    address: int
    pitch: int


def tile_of(rows, vectors, paired=False):
    """Return ``tile(patches, weights, start, out)``, a product held in registers, for ``rows`` rows.

    ``out[j] = start[j] + Σ_t patches[j, t] weights[t]``, where a row of ``weights`` is ``vectors`` vectors.
    ``paired``: values of both matrices are pairs of bf16, multiplied and added at once; sums are float32.

    Written as LLVM's instructions, because the number of sums is a parameter and each is a variable.
    """

    @intrinsic
    def tile(typingctx, patches, weights, start, out):
        def codegen(context, builder, sig, args):
            patches, weights, *sums = args
            left = cgutils.unpack_tuple(builder, patches)
            start, out = (cgutils.unpack_tuple(builder, memory) for memory in sums)
            _emit(builder, (rows, vectors, paired), left, weights, start, out)
            return context.get_dummy_value()

        return types.void(patches, types.int64, start, out), codegen

    return tile


def _emit(builder, size, patches, weights, start, out):
    rows, vectors, paired = size
    address, row_table, taps, count = patches

    def at(address, *terms):
        for term in terms:
            address = builder.add(address, ir.Constant(I64, term) if isinstance(term, int) else term)
        return builder.inttoptr(address, ir.PointerType())

    def step(number, row):
        return builder.mul(number, ir.Constant(I64, row))

    cells = [(row, vector) for row in range(rows) for vector in range(vectors)]
    places = [
        builder.add(address, builder.load(at(row_table, 8 * row), align=8, typ=I64)) for row in range(rows)
    ]
    begin = [
        builder.load(at(start[0], step(start[1], row), _BYTES * vector), align=4, typ=V32)
        for row, vector in cells
    ]
    before, loop, done = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    t = builder.phi(I64)
    t.add_incoming(ir.Constant(I64, 0), before)
    sums = [builder.phi(V32) for _ in cells]
    tap = builder.load(at(taps, step(t, 8)), align=8, typ=I64)
    row_of_weights = step(t, _BYTES * vectors)
    right = [
        builder.load(at(weights, row_of_weights, _BYTES * vector), align=4, typ=V32)
        for vector in range(vectors)
    ]
    left = [splat_value(builder, builder.load(at(place, tap), align=4, typ=F32), V32) for place in places]
    more = [
        _multiplied(builder, paired, left[row], right[vector], total)
        for (row, vector), total in zip(cells, sums, strict=True)
    ]
    following = builder.add(t, ir.Constant(I64, 1))
    builder.cbranch(builder.icmp_signed("<", following, count), loop, done)
    t.add_incoming(following, builder.block)
    for total, first, last in zip(sums, begin, more, strict=True):
        total.add_incoming(first, before)
        total.add_incoming(last, loop)
    builder.position_at_end(done)
    for (row, vector), total in zip(cells, more, strict=True):
        builder.store(total, at(out[0], step(out[1], row), _BYTES * vector), align=4)


def _multiplied(builder, paired, a, b, total):
    """``a b + total``."""
    if not paired:
        return call_intrinsic(builder, "llvm.fma.v16f32", V32, [a, b, total])
    pairs = [builder.bitcast(value, PAIRS) for value in (a, b)]
    return call_intrinsic(builder, "llvm.x86.avx512bf16.dpbf16ps.512", V32, [total, *pairs])
