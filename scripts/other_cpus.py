"""Compile the CPU kernels for other processors: whether vectors come out, and that nothing outside is called.

Usage: ``python -m scripts.other_cpus``. It writes the table in ``docs/versions.md``. Compiled, not run:
whether the results are right there, only such a processor can show.
"""

import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import llvmlite.binding as llvm

from gammabeta.kernels.cpu import compiler, prepared
from gammabeta.kernels.cpu.registry import Key

PAGE = Path(__file__).parents[1] / "docs" / "versions.md"
BEGIN, END = "<!-- processors -->", "<!-- end of processors -->"


class Processor(NamedTuple):
    """What LLVM calls it, and what its vector instructions look like."""

    name: str
    triple: str
    cpu: str
    vector: str  # a pattern of the registers
    call: str = r"\tcallq?\t([\w.$]+)"


_ARM_CALL = r"\tbl\t([\w.$]+)"
PROCESSORS = (
    Processor("x86-64 of 2003: SSE2", "x86_64-unknown-linux-gnu", "x86-64", "%xmm"),
    Processor("x86-64-v3: AVX2", "x86_64-unknown-linux-gnu", "x86-64-v3", "%ymm"),
    Processor("x86-64-v4: AVX-512", "x86_64-unknown-linux-gnu", "x86-64-v4", "%zmm"),
    Processor(
        "Arm Neoverse N1: NEON", "aarch64-unknown-linux-gnu", "neoverse-n1", r"\bv\d+\.(?:4s|2d)", _ARM_CALL
    ),
    Processor("Apple M1: NEON", "arm64-apple-macosx", "apple-m1", r"\.(?:4s|2d)\t", _ARM_CALL),
)
KEYS = [
    Key("channels_first_train", activation="relu"),
    Key("channels_first_backward", activation="relu"),
    Key("channels_last_statistics"),
    Key("channels_last_forward", bf16=True, activation="silu"),
    Key("channels_last_reduce", activation="relu"),
    Key("channels_last_apply", activation="relu", residual=True, pool=True),
]


@cache
def intermediate(key: Key) -> str:
    """Numba's code of a kernel, the same for all processors but for its first lines."""
    return str(compiler.intermediate(key))


def assembly(key: Key, processor: Processor) -> str:
    """The kernel, compiled as on that processor."""
    target = llvm.Target.from_triple(processor.triple)
    machine: Any = target.create_target_machine(
        cpu=processor.cpu, opt=3, reloc="default", codemodel="jitdefault"
    )
    machine.emit_object = lambda module: machine.emit_assembly(module).encode()
    text = re.sub(r'(?m)^target triple = ".*"$', f'target triple = "{processor.triple}"', intermediate(key))
    layout = f'target datalayout = "{machine.target_data}"'
    text = re.sub(r'(?m)^target datalayout = ".*"$', layout, text)
    with (
        mock.patch.object(compiler, "_machine", return_value=machine),
        mock.patch.object(prepared, "find", return_value=llvm.parse_assembly(text)),
    ):
        return compiler.machine_code(key).decode()


def row(processor: Processor) -> str:
    """A line of the table."""
    vectors, kernels, outside = [], 0, Counter[str]()
    for key in KEYS:
        code = assembly(key, processor)
        defined = set(re.findall(r"(?m)^([\w.$]+):", code))
        outside.update(set(re.findall(processor.call, code)) - defined)
        lines = re.findall(r"(?m)^\t[a-z][^\n]*", code)
        vectors.append(sum(bool(re.search(processor.vector, line)) for line in lines) / len(lines))
        kernels += bool(vectors[-1])
        print(processor.cpu, key.slug, f"{vectors[-1]:.0%}", sorted(outside), file=sys.stderr)
    called = ", ".join(f"`{name}` ({count})" for name, count in sorted(outside.items())) or "nothing"
    share = f"{sorted(vectors)[len(vectors) // 2]:.0%}"
    return f"| {processor.name} | {len(KEYS)} | {kernels} | {share} | {called} |"


def table() -> str:
    """A line for each processor."""
    head = "| processor | kernels | with vectors | instructions on vectors, median | called outside of them |"
    return "\n".join([head, "|---|---|---|---|---|", *map(row, PROCESSORS)])


def main() -> None:
    """Compile, and put the table between the page's marks."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    text = PAGE.read_text("utf-8")
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    PAGE.write_text(f"{before}\n{table()}\n{after}", "utf-8")


if __name__ == "__main__":
    main()
