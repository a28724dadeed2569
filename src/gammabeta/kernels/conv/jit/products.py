"""The inner loop of a product of small matrices, held in registers whatever their sizes.

Written as LLVM's instructions, because the number of sums is a parameter and each is a variable.
"""

from llvmlite import ir
from numba.core import types

from ...cpu.jit.simd import F32, I64, LANES, PAIRS, V32, call_intrinsic, intrinsic, splat_value

_BYTES = 4 * LANES


def tile_of(rows, vectors, paired=False):
    """Return ``tile(a, bases, offsets, count, b, start, start_step, out, out_step)`` for this size.

    ``out[j] = start[j] + Σ_t a[bases[j] + offsets[t]] b[t]`` for ``rows`` values of j and t below ``count``,
    which is at least 1. ``a`` is float32, its two tables are int64, in bytes. A row of ``b`` is ``vectors``
    vectors; rows of ``start`` and ``out`` lie the given bytes apart: 0 for the same start in every row.

    ``paired``: values of ``a`` and ``b`` are pairs of bf16, multiplied and added at once; sums are float32.
    """

    @intrinsic
    def tile(typingctx, a, bases, offsets, count, b, start, start_step, out, out_step):
        def codegen(context, builder, sig, args):
            _emit(builder, rows, vectors, paired, *args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), codegen

    return tile


def _emit(builder, rows, vectors, paired, a, bases, offsets, count, b, start, start_step, out, out_step):
    def at(address, *terms):
        for term in terms:
            address = builder.add(address, ir.Constant(I64, term) if isinstance(term, int) else term)
        return builder.inttoptr(address, ir.PointerType())

    def step(number, row):
        return builder.mul(number, ir.Constant(I64, row))

    cells = [(row, vector) for row in range(rows) for vector in range(vectors)]
    places = [builder.add(a, builder.load(at(bases, 8 * row), align=8, typ=I64)) for row in range(rows)]
    begin = [
        builder.load(at(start, step(start_step, row), _BYTES * vector), align=4, typ=V32)
        for row, vector in cells
    ]
    before, loop, done = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    t = builder.phi(I64)
    t.add_incoming(ir.Constant(I64, 0), before)
    sums = [builder.phi(V32) for _ in cells]
    offset = builder.load(at(offsets, step(t, 8)), align=8, typ=I64)
    row_of_b = step(t, _BYTES * vectors)
    right = [builder.load(at(b, row_of_b, _BYTES * vector), align=4, typ=V32) for vector in range(vectors)]
    left = [splat_value(builder, builder.load(at(place, offset), align=4, typ=F32), V32) for place in places]
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
        builder.store(total, at(out, step(out_step, row), _BYTES * vector), align=4)


def _multiplied(builder, paired, a, b, total):
    """``a b + total``."""
    if not paired:
        return call_intrinsic(builder, "llvm.fma.v16f32", V32, [a, b, total])
    pairs = [builder.bitcast(value, PAIRS) for value in (a, b)]
    return call_intrinsic(builder, "llvm.x86.avx512bf16.dpbf16ps.512", V32, [total, *pairs])
