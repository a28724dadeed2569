"""A program, not a test: compile kernels for compute capability 9.0 and say what the machine code holds.

The argument is a JSON list of ``[kernel, shape, rows, pool, storage, activation, kept]``, kept: the residual;
the output is a JSON object from each of them to its counts. No GPU is needed; the interpreter must be off.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gammabeta.kernels.gpu import backward_kernels, forward_kernels, plan

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
STORED = (
    "x_ptr",
    "residual_ptr",
    "out_ptr",
    "grad_ptr",
    "dx_ptr",
    "dz_ptr",
)  # the rest is float32, per channel


def signature(kernel, storage, constants):
    """Types, and which pointers are 16-byte aligned, as a launch on fresh tensors would find them."""
    types, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            stored = storage if name in STORED else "u8" if name == "accepted_ptr" else "fp32"
            types[name] = f"*{stored}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            types[name] = "fp32" if name in ("eps", "per_value", "factor", "unbias") else "i32"
    return types, attributes


def cut(name, view):
    """The tiles that the host would choose."""
    tensors = 1 if name in ("normalise", "whole_channels") else 2
    if name.startswith("whole"):
        return plan.owned(view, tensors, plan.Chip(1, 1 << 40))
    return plan.tile(view, tensors, hasattr(backward_kernels, name))


def look(name, shape, rows, pool, storage, activation, kept):
    """Compile one kernel; registers, spills and the widths of its accesses."""
    kernel = getattr(forward_kernels, name, None) or getattr(backward_kernels, name)
    view = plan.view_of(tuple(shape), rows, pool, SIZES[storage])
    t = cut(name, view)
    constants = {"ACT": activation, "POOL": view.pool, "APPLY": True, **t.shape}
    if name.startswith("merge"):
        constants |= {"BC": 4, "BK": 1024}
    elif name == "update_running":
        constants |= {"BC": 1024}
    if not kept:
        constants |= {"residual_ptr": None, "dz_ptr": None, "accepted_ptr": None}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    types, attributes = signature(kernel, storage, constants)
    indexed = {(kernel.arg_names.index(k),): v for k, v in constants.items()}
    options = {"num_warps": t.warps, "enable_fp_fusion": True}
    if name.startswith("partial"):
        options["maxnreg"] = plan.REDUCTION_REGISTERS
    source = ASTSource(kernel, types, indexed, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()

        def dump(what):
            return subprocess.run([TOOL, what, file.name], capture_output=True, text=True, check=True).stdout

        usage, code = dump("--dump-resource-usage"), dump("--dump-sass")

    def count(pattern):
        return len(re.findall(pattern, code))

    registers, stack, local = (int(re.search(rf"{k}:(\d+)", usage)[1]) for k in ("REG", "STACK", "LOCAL"))
    return {
        "registers": registers,
        "warps": t.warps,
        "shared": made.metadata.shared,
        "stack": stack + local,
        "spills": count(r"\b(?:LDL|STL)\b"),
        "loads": count(r"\bLDG\b"),
        "wide_loads": count(r"\bLDG\S*\.128\b"),
        "wide_stores": count(r"\bSTG\S*\.128\b"),
        "narrow_loads": count(r"\bLDG\S*\.U16\b"),
        "pipelined_loads": count(r"\bLDGSTS\S*\.128\b"),
        "atomics": count(r"\b(?:ATOM|ATOMG|RED)\b"),
    }


if __name__ == "__main__":
    print(json.dumps([look(*case) for case in json.loads(sys.argv[1])]))
