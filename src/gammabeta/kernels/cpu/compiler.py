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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import prepared
from .cache import alone, keep, read, tell_compiling
from .registry import Key

_lock = threading.RLock()
_addresses: dict[Key, int] = {}
_engines: list[Any] = []  # an engine owns the code it loaded
_thread = threading.local()  # ``missing``: the kernels that this thread's rehearsal has noted
rehearsals = 0  # that go on now, in all threads; asked for at each launch


def address(key: Key) -> int:
    """The kernel's address in this process: from memory, else from disk, else compiled now."""
    found = _addresses.get(key)
    if found is not None:
        return found
    with _lock:
        if key not in _addresses:
            _addresses[key] = _load(key)
        return _addresses[key]


@contextmanager
def rehearsal() -> Iterator[dict[Key, None]]:
    """Find out which kernels a computation needs that this machine has not compiled; gives them in order.

    From the first of them on, this thread runs none any more, and what they would have computed is not set:
    the results of a rehearsal are worth nothing.
    """
    global rehearsals
    missing: dict[Key, None] = {}
    with _lock:
        rehearsals += 1
    _thread.missing = missing
    try:
        yield missing
    finally:
        _thread.missing = None
        with _lock:
            rehearsals -= 1


def left_out(keys: Iterable[Key]) -> bool:
    """Whether a rehearsal on this thread leaves these kernels out; it notes those that are missing."""
    missing: dict[Key, None] | None = getattr(_thread, "missing", None)
    if missing is None:
        return False
    missing.update((key, None) for key in lacking(keys))
    return bool(missing)


def lacking(keys: Iterable[Key]) -> list[Key]:
    """Those of the kernels that this machine has not compiled."""
    return [key for key in keys if key not in _addresses and read(_path(key)) is None]


def cache_directory() -> Path:
    """Where compiled kernels are kept: ``NUMBA_CACHE_DIR`` if set, else the user's cache directory."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        return Path(chosen) / "gammabeta"
    from platformdirs import user_cache_path

    return user_cache_path("gammabeta", appauthor=False) / "kernels"


def _load(key: Key) -> int:
    code = read(_path(key))
    if code is not None:
        return _loaded(code)
    tell_compiling(cache_directory())
    with alone(_path(key)):
        code = read(_path(key))
        return _loaded(code) if code is not None else _kept(key, machine_code(key))


def accept(key: Key, code: bytes) -> None:
    """Keep a kernel that another process has compiled, and load it."""
    with _lock:
        if key not in _addresses:
            _addresses[key] = _kept(key, code)


def _kept(key: Key, code: bytes) -> int:
    keep(_path(key), code)
    return _loaded(code)


def _path(key: Key) -> Path:
    return cache_directory() / f"{key.slug}-{_fingerprint()}.o"


def _loaded(code: bytes) -> int:
    llvm = _llvm()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine(llvm))
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address("kernel"))


@cache
def _llvm() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm


def machine_code(key: Key) -> bytes:
    """Compile a kernel; the entry is named ``kernel``, nothing else of it is seen, nothing outside is called.

    Numba would optimise and compile each of the functions that a kernel is made of, then the kernel with all
    of them in it. So it is asked for neither, and LLVM does both once, for the whole.
    """
    llvm = _llvm()
    module = prepared.find(key, llvm) or intermediate(key)
    machine = _machine(llvm)
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = True
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    # A kernel cannot raise: the handling of errors, which calls Python, is found dead and taken out.
    passes = llvm.create_new_module_pass_manager()
    passes.add_ipsccp_pass()
    passes.add_simplify_cfg_pass()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, builder)
    return bytes(machine.emit_object(module))


def intermediate(key: Key) -> Any:
    """Numba's module of a kernel, in which everything but the entry is private and what is dead is gone."""
    from numba import cfunc, types
    from numba import config as settings
    from numba.core.compiler_lock import global_compiler_lock
    from numba.core.registry import cpu_target

    from .registry import make

    cpu_target.target_context  # noqa: B018 -- made at the level of the user's settings, and kept
    with global_compiler_lock:  # nobody else compiles meanwhile
        config: Any = settings
        level, config.OPT = config.OPT, type(config.OPT)(0)
        try:
            kernel, record = make(key)
            function = cfunc(types.void(record, types.int64), error_model="numpy")(kernel)
        finally:
            config.OPT = level
    llvm = _llvm()
    module = llvm.parse_assembly(function.inspect_llvm())
    for inner in module.functions:
        if inner.name == function.native_name:
            inner.name = "kernel"
        elif not inner.is_declaration:
            inner.linkage = "internal"
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.add_sroa_pass()
    passes.add_simplify_cfg_pass()
    passes.add_instruction_combine_pass()
    passes.add_dead_code_elimination_pass()
    passes.add_ipsccp_pass()  # a kernel cannot raise: the handling of errors is found dead
    passes.add_simplify_cfg_pass()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(_machine(llvm), llvm.create_pipeline_tuning_options()))
    return module


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
        prepared.digest(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
