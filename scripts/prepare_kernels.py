"""Write ``kernels/cpu/prepared.xz`` anew: what Numba makes of the kernels that most networks need.

Usage: ``python -m scripts.prepare_kernels``, on Linux on an x86-64 processor, after a change of a kernel.
"""

import argparse
import json
import re
import subprocess
import sys
from unittest import mock

from gammabeta.kernels.cpu import compiler, prepared
from gammabeta.kernels.cpu.jit import loads
from gammabeta.kernels.cpu.registry import Key

WINDOW = (3, 2, 1)  # the max pooling of ResNets
SMALL = ("work", "finish_statistics", "finish_gradients", "update_running")
#: The three networks of digits: the recipes fast, classic and best, in float32 and in bf16.
DIGITS = (
    *(
        Key(f"channels_last_{name}", bf16, "relu", False, True)
        for bf16 in (False, True)
        for name in ("forward", "reduce", "apply")
    ),
    *(Key("channels_last_statistics", bf16) for bf16 in (False, True)),
    *(Key(name, vectors=2) for name in ("finish_stem_gradients", "stem_weights")),
    *(Key(name) for name in ("finish_stem_statistics", "stem_moments", "input_gradient")),
    *(Key("serving_convolution", bf16, "relu", False, True, 2) for bf16 in (False, True)),
    *(Key("stem_reduce", bf16, "relu", False, True, 2) for bf16 in (False, True)),
    *(Key(name, True, vectors=4) for name in ("finish_weight_gradient", "weight_gradient")),
    Key("input_gradient", True),
)
#: Residual networks of others, and ours for pictures, in both layouts.
NETWORKS = tuple(
    Key(f"channels_{layout}_{name}", False, activation, residual, pool)
    for layout, names in (
        ("first", ("train", "forward", "backward")),
        ("last", ("forward", "reduce", "apply")),
    )
    for activation, residual, pool in (
        (None, False, False),
        ("relu", False, False),
        ("relu", True, False),
        ("relu", False, WINDOW),
    )
    for name in names
)
KEYS = (*map(Key, SMALL), *DIGITS, *NETWORKS)


def texts(rounds: bool) -> dict[str, str]:
    """The kernels' IR by name, for processors that round to bf16 themselves, or do not."""
    with (
        mock.patch.object(prepared, "rounds_to_bf16", return_value=rounds),
        mock.patch.object(loads, "rounds_to_bf16", return_value=rounds),
    ):
        wanted = [key for key in KEYS if key.bf16 or not rounds]
        return {prepared.name_of(key): str(compiler.intermediate(key)) for key in wanted}


def main() -> None:
    """Make both kinds, each in a process of its own: Numba remembers what it has compiled."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", choices=("yes", "no"), help=argparse.SUPPRESS)
    rounds = parser.parse_args().rounds
    if rounds is not None:
        json.dump(texts(rounds == "yes"), sys.stdout)
        return
    found: dict[str, str] = {}
    for rounds in ("no", "yes"):
        command = [sys.executable, "-m", "scripts.prepare_kernels", "--rounds", rounds]
        found |= json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    import llvmlite.binding as llvm

    of_this_process = [name for name, text in found.items() if re.search(r"@(numba|Py|NRT|\.const)", text)]
    if of_this_process:
        raise SystemExit(f"these hold what belongs to one process: {', '.join(of_this_process)}")
    prepared.write(found, llvm.get_process_triple())
    print(f"{len(found)} kernels, {prepared.FILE.stat().st_size // 1024} KiB: {prepared.FILE}")


if __name__ == "__main__":
    main()
