"""Records of arguments as a Numba type: ``args.channels`` in a kernel loads the field from memory.

A kernel is handed the record's address. Nothing writes to it while the kernel runs, and LLVM is told so: a
field is loaded once, however often and wherever a kernel names it.
"""

from llvmlite import ir
from numba.core import types
from numba.core.extending import lower_getattr_generic, models, register_model
from numba.core.typing.templates import AttributeTemplate, infer_getattr

_NUMBERS = {int: types.int64, float: types.float64}
_LLVM = {types.int64: ir.IntType(64), types.float64: ir.DoubleType()}


class RecordType(types.Type):
    """The address of a record's 64-bit fields."""

    def __init__(self, record):
        self.fields = {name: _NUMBERS[type(default)] for name, default in record._field_defaults.items()}
        super().__init__(f"{record.__module__}.{record.__qualname__}")


@register_model(RecordType)
class _RecordModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.IntType(64))


@infer_getattr
class _RecordFields(AttributeTemplate):
    key = RecordType

    def generic_resolve(self, typ, attr):  # type: ignore[override]
        return typ.fields.get(attr)


@lower_getattr_generic(RecordType)
def _load_field(context, builder, record, address, name):
    where = builder.add(address, ir.Constant(ir.IntType(64), 8 * list(record.fields).index(name)))
    pointer = builder.inttoptr(where, ir.PointerType())
    value = builder.load(pointer, align=8, typ=_LLVM[record.fields[name]])
    value.set_metadata("invariant.load", builder.module.add_metadata([]))
    return value


def takes(record):
    """Declare which record the kernels of a maker are handed."""

    def declare(maker):
        maker.record = RecordType(record)
        return maker

    return declare
