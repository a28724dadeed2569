"""Compiled for an H100 without one: 16-byte accesses, no spills, no atomics.

The interpreter runs Python; this shows that the real compiler takes the kernels, and what it makes of them.
Triton's wheel carries the assembler and a disassembler.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gammabeta.epilogue import ACTIVATIONS

pytest.importorskip("triton")

NAMES = (
    "partial_statistics",
    "normalise",
    "partial_sums",
    "input_gradient",
    "whole_channels",
    "whole_channels_backward",
)
SHAPES = (
    (64, 64, 56, 56),
    (64, 512, 28, 28),
    (64, 256, 14, 14),
    (64, 2048, 7, 7),
    (64, 20, 26, 26),
    (64, 50, 9, 9),
)


def compiler(cases):
    """``machine_code.py`` in a process without the interpreter."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", Path(__file__).with_name("machine_code.py"), json.dumps(cases)],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        timeout=280,
    )


def compiled(cases):
    """What ``machine_code.py`` finds."""
    done = compiler(cases)
    assert done.returncode == 0, done.stderr[-2000:]
    return list(zip(cases, json.loads(done.stdout), strict=True))


def fits(code):
    """Registers for at least three programs of 4 warps, or one of 8; shared memory of an Ada card; few
    spills.

    The assembler itself aims at an occupancy and gives up some words for it; a spilled tile is hundreds of
    bytes.
    """
    room = 65536 // (1 if code["warps"] == 8 else 3)
    return (
        code["stack"] <= 128 and code["registers"] * 32 * code["warps"] <= room and code["shared"] <= 99 << 10
    )


def test_main_cases():
    """Both layouts of a ResNet stage in bf16: every access to a large tensor is 16 bytes wide."""
    cases = [
        [name, SHAPES[1], rows, None, "bf16", "relu", False] for rows in (False, True) for name in NAMES[:4]
    ]
    cases += [
        [name, SHAPES[0], False, None, "fp32", None, True]
        for name in ("merge_statistics", "merge_sums", "update_running")
    ]
    for case, code in compiled(cases):
        assert fits(code), (case, code)
        assert code["stack"] == code["spills"] == code["atomics"] == 0, (case, code)
        if case[0] in NAMES:
            assert code["wide_loads"] >= 4, (case, code)
            assert code["narrow_loads"] == 0, (case, code)
            reduces = case[0].startswith("partial")
            assert code["pipelined_loads" if reduces else "wide_stores"] >= 2, (case, code)


@pytest.mark.parametrize("name", ["normalise", "input_gradient"])
def test_an_activation_without_arithmetic_is_refused(name):
    """By the compiler, forward and backward: an unknown name must never become the identity."""
    done = compiler([[name, SHAPES[1], False, None, "bf16", "nonsense", False]])
    assert done.returncode != 0
    assert "this activation has no arithmetic here" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("pool", [None, 2])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(
    ("shape", "activation"),
    list(zip(itertools.cycle(SHAPES), ACTIVATIONS, strict=False)),
)
def test_every_kernel(storage, pool, rows, shape, activation):
    """All kernels for shapes that divide well and badly, with and without a residual."""
    cases = [
        [name, shape, rows, pool, storage, activation, kept]
        for name in NAMES
        for kept in (False, True)
        if not (name == "partial_statistics" and (pool or kept))
    ]
    assert not [(case, code) for case, code in compiled(cases) if not fits(code)]
