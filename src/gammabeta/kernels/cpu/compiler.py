"""Compile a kernel when first wanted, keep its machine code on disk, and load it without Numba ever after.

Numba turns the Python of a kernel into LLVM IR. The machine code made from it is a plain object file
without a single outside symbol, so a later process needs llvmlite alone to load it: milliseconds, and no
``import numba``. A file is named after everything it depends on (the processor and its features, the
versions of Numba and llvmlite, the source text of this folder, the kernel's name and options), so nothing
stale is ever loaded; ``cache`` sees to it that nothing damaged or foreign is.
"""

import hashlib
import os
import sys
import threading
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .cache import keep, read, tell_compiling
from .registry import Key

_lock = threading.RLock()
_addresses: dict[Key, int] = {}
_engines: list[Any] = []  # an engine owns the code it loaded


def address(key: Key) -> int:
    """The kernel's address in this process: from memory, else from disk, else compiled now."""
    found = _addresses.get(key)
    if found is not None:
        return found
    with _lock:
        if key not in _addresses:
            _addresses[key] = _load(key)
        return _addresses[key]


def cache_directory() -> Path:
    """Where compiled kernels are kept: ``NUMBA_CACHE_DIR`` if set, else the user's cache directory."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        return Path(chosen) / "gammabeta"
    from platformdirs import user_cache_path

    return user_cache_path("gammabeta", appauthor=False) / "kernels"


def _load(key: Key) -> int:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    directory = cache_directory()
    path = directory / f"{key.slug}-{_fingerprint()}.o"
    code = read(path)
    if code is None:
        tell_compiling(directory)
        code = _compile(key, llvm)
        keep(path, code)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine(llvm))
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address("kernel"))


def _compile(key: Key, llvm: Any) -> bytes:
    """Numba's IR of the kernel, everything but the entry made private and what is then dead removed."""
    from numba import cfunc, types

    from .registry import make

    kernel, record = make(key)
    function = cfunc(types.void(record, types.int64), error_model="numpy")(kernel)
    module = llvm.parse_assembly(function.inspect_llvm())
    for inner in module.functions:
        if inner.name == function.native_name:
            inner.name = "kernel"
        elif not inner.is_declaration:
            inner.linkage = "internal"
    machine = _machine(llvm)
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=0))
    passes = llvm.create_new_module_pass_manager()
    passes.add_ipsccp_pass()
    passes.add_simplify_cfg_pass()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, builder)
    return bytes(machine.emit_object(module))


@cache
def _machine(llvm: Any) -> Any:
    """This processor, as Numba describes it to LLVM."""
    triple = llvm.get_process_triple() + ("-elf" if sys.platform == "win32" else "")
    return llvm.Target.from_triple(triple).create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=_features(llvm),
        opt=3,
        reloc="default",
        codemodel="jitdefault",
        jit=True,
    )


def _features(llvm: Any) -> str:
    try:
        return str(llvm.get_host_cpu_features().flatten())
    except RuntimeError:  # LLVM cannot tell on some ARM machines; the processor's name implies them
        return ""


@cache
def _fingerprint() -> str:
    """Everything a compiled file depends on besides its key, in sixteen hexadecimal digits."""
    import llvmlite.binding as llvm

    parts = [
        llvm.get_process_triple(),
        llvm.get_host_cpu_name(),
        _features(llvm),
        version("numba"),
        version("llvmlite"),
        *(path.read_text(encoding="utf-8") for path in _sources()),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _sources() -> list[Path]:
    """The files whose text decides what a kernel compiles to."""
    kernels = Path(__file__).parents[1]
    patterns = ("*/jit/*.py", "*/*arguments.py", "cpu/compiler.py", "cpu/registry.py")
    return [path for pattern in patterns for path in sorted(kernels.glob(pattern))]
