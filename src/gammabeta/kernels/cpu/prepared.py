"""LLVM IR of the kernels that most networks need, made by Numba beforehand and shipped with the package.

Four fifths of the time that a kernel takes to compile is Numba's, and what it makes of one is the same on
every machine of a kind. ``scripts/prepare_kernels.py`` writes the file. It counts as long as it was made from
the text of the kernels that is here, for this kind of machine; LLVM makes the machine code of it as ever.
"""

import hashlib
import json
import lzma
from functools import cache
from pathlib import Path
from typing import Any

from .features import rounds_to_bf16
from .registry import Key

FILE = Path(__file__).with_name("prepared.xz")


def find(key: Key, llvm: Any) -> Any:
    """The module of a kernel as LLVM reads it, or None where Numba has to make it."""
    text = _texts(llvm.get_process_triple()).get(name_of(key))
    if text is None:
        return None
    try:
        return llvm.parse_assembly(text)
    except RuntimeError:  # written for another LLVM
        return None


def name_of(key: Key) -> str:
    """What a kernel is called in the file; its text differs where the processor itself rounds to bf16."""
    return f"{key.slug}-rounding" if key.bf16 and rounds_to_bf16() else key.slug


def digest() -> str:
    """Of the text that decides what Numba makes of a kernel."""
    text = "\0".join(path.read_text(encoding="utf-8") for path in sources())
    return hashlib.sha256(text.encode()).hexdigest()


def sources() -> list[Path]:
    """The files whose text decides what a kernel compiles to."""
    kernels = Path(__file__).parents[1]
    patterns = ("*/jit/*.py", "*/*arguments.py", "cpu/compiler.py", "cpu/registry.py", "cpu/features.py")
    return [path for pattern in patterns for path in sorted(kernels.glob(pattern))]


@cache
def _texts(triple: str) -> dict[str, str]:
    try:
        content = json.loads(lzma.decompress(FILE.read_bytes()))
    except (OSError, lzma.LZMAError, ValueError):
        return {}
    fits = content["triple"] == triple and content["sources"] == digest()
    return content["texts"] if fits else {}


def write(texts: dict[str, str], triple: str) -> None:
    """Write the file."""
    content = {"triple": triple, "sources": digest(), "texts": texts}
    FILE.write_bytes(lzma.compress(json.dumps(content).encode(), preset=9 | lzma.PRESET_EXTREME))
