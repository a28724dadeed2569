"""Loads and stores of sixteen lanes, by storage type; scalars, prefetching.

Memory is addressed by ``address`` (bytes, int64) and ``index`` (elements). A tail of fewer than sixteen
elements is read and written by ``count``: lanes beyond it read as zero and are not stored.
"""

from types import SimpleNamespace

from llvmlite import ir
from numba.core import types

from ..features import rounds_to_bf16
from .simd import (
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    LANES,
    V32,
    V64,
    VBF16,
    VI8,
    VI16,
    VI32,
    call_intrinsic,
    first_mask,
    instructions,
    intrinsic,
    mask,
    vector,
    wide,
)


def _pointer(builder, element, address, index):
    size = {F32: 4, F64: 8, I8: 1, I16: 2, I64: 8}[element]
    where = builder.add(address, builder.mul(index, ir.Constant(I64, size)))
    return builder.inttoptr(where, ir.PointerType())


def _widen_bf16(builder, halves):
    """A bf16 is the upper half of the float32 of the same value."""
    whole = builder.shl(builder.zext(halves, VI32), ir.Constant(VI32, [16] * LANES))
    return builder.bitcast(whole, V32)


def _narrow_bf16(builder, value):
    """Round to nearest, ties to even, NaN stays NaN: by adding just under half of the last kept bit."""
    if rounds_to_bf16():
        return builder.bitcast(builder.fptrunc(value, VBF16), VI16)
    whole = builder.bitcast(value, VI32)
    kept = builder.lshr(whole, ir.Constant(VI32, [16] * LANES))
    odd = builder.and_(kept, ir.Constant(VI32, [1] * LANES))
    rounded = builder.add(whole, builder.add(odd, ir.Constant(VI32, [0x7FFF] * LANES)))
    rounded = builder.lshr(rounded, ir.Constant(VI32, [16] * LANES))
    quiet = builder.or_(kept, ir.Constant(VI32, [0x40] * LANES))
    nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(nan, quiet, rounded), VI16)


def _masked(builder, kind, element, pointer, count, value=None):
    """LLVM's masked load (or store of ``value``) of ``count`` elements."""
    lanes = ir.VectorType(element, LANES)
    suffix = {F32: "v16f32", F64: "v16f64", I8: "v16i8", I16: "v16i16"}[element]
    align = ir.Constant(I32, {F32: 4, F64: 8, I8: 1, I16: 2}[element])
    some = first_mask(builder, count)
    if kind == "load":
        zeros = ir.Constant(lanes, [0] * LANES)
        return call_intrinsic(builder, f"llvm.masked.load.{suffix}.p0", lanes, [pointer, align, some, zeros])
    return call_intrinsic(
        builder, f"llvm.masked.store.{suffix}.p0", ir.VoidType(), [value, pointer, align, some]
    )


def _memory(element, lanes, after_load, before_store, get=None):
    """Loads and stores of one storage type: whole vectors, the first ``count`` lanes, scalars, streaming."""
    align = {F32: 4, F64: 8, I8: 1, I16: 2}[element]
    loaded = wide if element == F64 else vector

    @instructions(loaded, types.int64, types.int64)
    def load(builder, address, index):
        return after_load(
            builder, builder.load(_pointer(builder, element, address, index), align=align, typ=lanes)
        )

    @instructions(loaded, types.int64, types.int64, types.int64)
    def load_some(builder, address, index, count):
        pointer = _pointer(builder, element, address, index)
        return after_load(builder, _masked(builder, "load", element, pointer, count))

    @instructions(types.void, types.int64, types.int64, loaded)
    def store(builder, address, index, value):
        pointer = _pointer(builder, element, address, index)
        builder.store(before_store(builder, value), pointer, align=align)

    @instructions(types.void, types.int64, types.int64, loaded, types.int64)
    def store_some(builder, address, index, value, count):
        pointer = _pointer(builder, element, address, index)
        _masked(builder, "store", element, pointer, count, before_store(builder, value))

    @instructions(types.void, types.int64, types.int64, loaded)
    def stream(builder, address, index, value):
        pointer = _pointer(builder, element, address, index)
        written = builder.store(before_store(builder, value), pointer, align=LANES * align)
        written.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))

    return SimpleNamespace(
        size=align, get=get, load=load, load_some=load_some, store=store, store_some=store_some, stream=stream
    )


def _scalar(element, number, size):
    """Read and write one scalar."""

    @instructions(number, types.int64, types.int64)
    def get(builder, address, index):
        return builder.load(_pointer(builder, element, address, index), align=size, typ=element)

    @intrinsic
    def put(typingctx, address, index, value):
        def codegen(context, builder, sig, args):
            cast = context.cast(builder, args[2], sig.args[2], number)
            builder.store(cast, _pointer(builder, element, *args[:2]), align=size)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, value), codegen

    return get, put


get_f32, put_f32 = _scalar(F32, types.float32, 4)
get_f64, put_f64 = _scalar(F64, types.float64, 8)
get_i64, put_i64 = _scalar(I64, types.int64, 8)


def _prefetch(name, write, doc):
    def emit(builder, address):
        pointer = builder.inttoptr(address, ir.PointerType())
        hints = [ir.Constant(I32, n) for n in (write, 3, 1)]  # into every level, data
        call_intrinsic(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, *hints])

    emit.__name__, emit.__doc__ = name, doc
    return instructions(types.void, types.int64)(emit)


prefetch = _prefetch("prefetch", 0, "Fetch the cache line of ``address``, if there is such memory.")
prefetch_write = _prefetch("prefetch_write", 1, "The same, for a line that will be written.")


@instructions(types.void)
def fence(builder):
    """Make what was streamed visible to other threads."""
    builder.fence("seq_cst")


@instructions(types.float32, types.int64, types.int64)
def get_bf16(builder, address, index):
    """One bf16 as a float32."""
    half = builder.load(_pointer(builder, I16, address, index), align=2, typ=I16)
    return builder.bitcast(builder.shl(builder.zext(half, I32), ir.Constant(I32, 16)), F32)


@instructions(mask, types.int64, types.int64)
def kept_lanes(builder, address, index):
    """The lanes whose byte is not 0, of sixteen from ``index`` on."""
    found = builder.load(_pointer(builder, I8, address, index), align=1, typ=VI8)
    return builder.icmp_unsigned("!=", found, ir.Constant(VI8, [0] * LANES))


@instructions(mask, types.int64, types.int64, types.int64)
def kept_some(builder, address, index, count):
    """The same of ``count``; none beyond."""
    found = _masked(builder, "load", I8, _pointer(builder, I8, address, index), count)
    return builder.icmp_unsigned("!=", found, ir.Constant(VI8, [0] * LANES))


@instructions(types.int64, types.int64, types.int64)
def get_byte(builder, address, index):
    """One byte, 0 to 255."""
    return builder.zext(builder.load(_pointer(builder, I8, address, index), align=1, typ=I8), I64)


def _widen_byte(builder, bytes_):
    return builder.uitofp(bytes_, V32)


def _narrow_byte(builder, value):
    return builder.fptoui(value, VI8)


def _same(builder, value):
    return value


float32 = _memory(F32, V32, _same, _same, get_f32)
bfloat16 = _memory(I16, VI16, _widen_bf16, _narrow_bf16, get_bf16)
float64 = _memory(F64, V64, _same, _same, get_f64)
byte = _memory(I8, VI8, _widen_byte, _narrow_byte)  # whole numbers below 256
