"""Sixteen float32 lanes as a Numba type, so that the kernels say how they use the machine.

Numba leaves vectorisation to LLVM's loop vectoriser, which gives up or picks half the width for reasons
that are hard to see. Here a ``Vector`` is LLVM's ``<16 x float>`` and a ``Wide`` is ``<16 x double>``: on
AVX-512 one register, on AVX2 two, on NEON four, split by LLVM. The usual operators work lane by lane and
nothing is ever re-associated. How lanes meet memory is in ``loads``.
"""

import inspect
import operator
from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import extending, types
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

LANES = 16
intrinsic: Any = extending.intrinsic  # its own annotations describe the undecorated function
#: For the functions kernels are made of: always inlined, and nothing is built to call them from Python.
_options: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
inlined: Any = njit(forceinline=True, **_options)

F32, F64, I1, I8, I16, I32, I64 = (
    ir.FloatType(),
    ir.DoubleType(),
    ir.IntType(1),
    ir.IntType(8),
    ir.IntType(16),
    ir.IntType(32),
    ir.IntType(64),
)
V32, V64, VB, VI8, VI16, VI32 = (ir.VectorType(t, LANES) for t in (F32, F64, I1, I8, I16, I32))


class LanesType(types.Type):
    """Sixteen values side by side; ``llvm`` is how LLVM spells them."""

    def __init__(self, name: str, llvm: ir.VectorType) -> None:
        self.llvm = llvm
        super().__init__(name)


class VectorType(LanesType):
    """``<16 x float>``."""


class WideType(LanesType):
    """``<16 x double>``."""


class MaskType(LanesType):
    """``<16 x i1>``."""


vector = VectorType("vector", V32)
wide = WideType("wide", V64)
mask = MaskType("mask", VB)


class _LanesModel(extending.models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, fe_type.llvm)


for _type in (VectorType, WideType, MaskType):
    extending.register_model(_type)(_LanesModel)


# --- operators --------------------------------------------------------------------------------------------


def _operator(key, operand, result, emit):
    """Teach Numba ``operand key operand -> result``; ``emit(builder, a, b)`` writes the instruction."""

    def generic(self, args, kws):
        return signature(result, operand, operand) if args == (operand, operand) else None

    infer_global(key)(type("Template", (AbstractTemplate,), {"key": key, "generic": generic}))

    @lower_builtin(key, operand, operand)
    def lower(context, builder, sig, args):
        return emit(builder, *args)


for _operand in (vector, wide):
    _operator(operator.add, _operand, _operand, lambda b, x, y: b.fadd(x, y))
    _operator(operator.sub, _operand, _operand, lambda b, x, y: b.fsub(x, y))
    _operator(operator.mul, _operand, _operand, lambda b, x, y: b.fmul(x, y))
    _operator(operator.truediv, _operand, _operand, lambda b, x, y: b.fdiv(x, y))
_operator(operator.lt, vector, mask, lambda b, x, y: b.fcmp_ordered("<", x, y))
_operator(operator.le, vector, mask, lambda b, x, y: b.fcmp_ordered("<=", x, y))
_operator(operator.gt, vector, mask, lambda b, x, y: b.fcmp_ordered(">", x, y))
_operator(operator.ge, vector, mask, lambda b, x, y: b.fcmp_ordered(">=", x, y))
_operator(operator.eq, vector, mask, lambda b, x, y: b.fcmp_ordered("==", x, y))
_operator(operator.ne, vector, mask, lambda b, x, y: b.fcmp_unordered("!=", x, y))
_operator(operator.or_, mask, mask, lambda b, x, y: b.or_(x, y))
_operator(operator.and_, mask, mask, lambda b, x, y: b.and_(x, y))


# --- lanes to lanes ---------------------------------------------------------------------------------------


def splat_value(builder, scalar, llvm):
    """The scalar in every lane, as LLVM's value."""
    one = builder.insert_element(ir.Constant(llvm, ir.Undefined), scalar, ir.Constant(I32, 0))
    zeros = ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(llvm, ir.Undefined), zeros)


def call_intrinsic(builder, name, result, args):
    """Call the LLVM intrinsic ``name``, spelled out with its type suffixes."""
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(function, args)


def instructions(result, *operands):
    """An intrinsic of these types; what is decorated writes its instructions: ``emit(builder, *values)``."""

    def decorate(emit):
        def typed(typingctx, *given):
            def codegen(context, builder, sig, args):
                value = emit(builder, *args)
                return context.get_dummy_value() if value is None else value

            return result(*operands), codegen

        typed.__name__, typed.__doc__ = emit.__name__, emit.__doc__
        # Numba reads the names of the parameters here, and skips the first.
        typed.__signature__ = inspect.signature(emit)  # type: ignore[attr-defined]
        return intrinsic(typed)

    return decorate


@intrinsic
def splat(typingctx, scalar):
    """The float in every lane of a Vector."""

    def codegen(context, builder, sig, args):
        return splat_value(builder, context.cast(builder, args[0], sig.args[0], types.float32), V32)

    return vector(scalar), codegen


@intrinsic
def splat_wide(typingctx, scalar):
    """The number in every lane of a Wide."""

    def codegen(context, builder, sig, args):
        return splat_value(builder, context.cast(builder, args[0], sig.args[0], types.float64), V64)

    return wide(scalar), codegen


@intrinsic
def fma(typingctx, a, b, c):
    """``a * b + c``, rounded once."""
    suffix = "v16f32" if a == vector else "v16f64"

    def codegen(context, builder, sig, args):
        return call_intrinsic(builder, f"llvm.fma.{suffix}", args[0].type, args)

    return a(a, a, a), codegen


class _BFloat16(ir.Type):  # type: ignore[misc]
    """LLVM's ``bfloat``, which llvmlite has no name for."""

    def __str__(self) -> str:
        return "bfloat"


VBF16, PAIRS = (ir.VectorType(_BFloat16(), lanes) for lanes in (LANES, 2 * LANES))


@instructions(vector, vector, vector)
def pair(builder, a, b):
    """Lanes of ``a`` and ``b``, cut off to bf16, side by side: that of ``a`` in the lower half."""
    low, high = (builder.bitcast(value, VI32) for value in (a, b))
    low = builder.lshr(low, ir.Constant(VI32, [16] * LANES))
    high = builder.and_(high, ir.Constant(VI32, [0xFFFF0000] * LANES))
    return builder.bitcast(builder.or_(low, high), V32)


@intrinsic
def select(typingctx, which, a, b):
    """Lane by lane: ``a`` where ``which``, else ``b``."""

    def codegen(context, builder, sig, args):
        return builder.select(*args)

    return a(mask, a, a), codegen


@instructions(mask, types.int64)
def first_lanes(builder, count):
    """The mask of the lanes below ``count``."""
    return first_mask(builder, count)


def first_mask(builder, count):
    """The mask of the lanes below ``count``, as LLVM's value."""
    wanted = splat_value(builder, builder.trunc(count, I32), VI32)
    return builder.icmp_unsigned("<", ir.Constant(VI32, list(range(LANES))), wanted)


@instructions(wide, vector)
def widen(builder, value):
    """float32 lanes as float64 lanes, exactly."""
    return builder.fpext(value, V64)


@intrinsic
def total(typingctx, value):
    """The sum of the lanes as a float64, each lane widened first, added as a tree."""

    def codegen(context, builder, sig, args):
        lanes, width = args[0] if value == wide else builder.fpext(args[0], V64), LANES
        while width > 1:
            half = width // 2
            low, high = (
                builder.shuffle_vector(
                    lanes,
                    ir.Constant(lanes.type, ir.Undefined),
                    ir.Constant(ir.VectorType(I32, half), list(range(start, start + half))),
                )
                for start in (0, half)
            )
            lanes, width = builder.fadd(low, high), half
        return builder.extract_element(lanes, ir.Constant(I32, 0))

    return types.float64(value), codegen


def _shuffle(name, lanes, doc):
    def emit(builder, a, b):
        return builder.shuffle_vector(a, b, ir.Constant(VI32, lanes))

    emit.__name__, emit.__doc__ = name, doc
    return instructions(vector, vector, vector)(emit)


even_lanes = _shuffle("even_lanes", list(range(0, 2 * LANES, 2)), "Lanes 0, 2, 4, … of two Vectors in a row.")
odd_lanes = _shuffle("odd_lanes", list(range(1, 2 * LANES, 2)), "Lanes 1, 3, 5, … of two Vectors in a row.")
_mixed = [lane for i in range(LANES) for lane in (i, LANES + i)]
mixed_low = _shuffle("mixed_low", _mixed[:LANES], "The lower lanes of two Vectors in turn: a0, b0, a1, …")
mixed_high = _shuffle("mixed_high", _mixed[LANES:], "The upper lanes of two Vectors in turn: a8, b8, a9, …")


@instructions(vector, vector)
def power_of_two(builder, shifted):
    """``2 ** n`` where ``shifted`` is ``n + 1.5 * 2**23``, whose last bits are ``n``; infinite at 128."""
    whole = builder.add(builder.bitcast(shifted, VI32), ir.Constant(VI32, [127] * LANES))
    return builder.bitcast(builder.shl(whole, ir.Constant(VI32, [23] * LANES)), V32)


@instructions(vector, vector)
def absolute(builder, value):
    """Each lane without its sign."""
    return call_intrinsic(builder, "llvm.fabs.v16f32", V32, [value])
