"""What of this processor decides which code a kernel has."""

from functools import cache


@cache
def rounds_to_bf16() -> bool:
    """Whether this processor has an instruction for it (which takes what is below 1.2e-38 for zero)."""
    import llvmlite.binding as llvm

    try:
        return bool(llvm.get_host_cpu_features().get("avx512bf16", False))
    except RuntimeError:  # LLVM cannot tell on some ARM machines
        return False
