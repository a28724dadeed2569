"""Which machine and which software a figure belongs to."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "numba", "llvmlite", "numpy", "triton")
_MICROARCHITECTURES = {("AuthenticAMD", 25): "Zen 3 or 4", ("AuthenticAMD", 26): "Zen 5"}


def describe() -> dict[str, Any]:
    """Machine, software, threads and commit, ready for JSON."""
    import torch

    return {
        "machine": name(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in _PACKAGES},
        "threads": torch.get_num_threads(),
        "commit": commit(Path(__file__).parent),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def name() -> str:
    """Such as ``2 cores of an AMD EPYC (Zen 5)``."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = _cpuinfo()
    model = info.get("model name") or platform.processor() or platform.machine()
    family = info.get("cpu family", "")
    kind = _MICROARCHITECTURES.get((info.get("vendor_id", ""), int(family) if family.isdigit() else 0))
    if kind == "Zen 3 or 4" and "avx512f" in info.get("flags", "").split():  # Zen 3 has no AVX-512
        kind = "Zen 4"
    return f"{cores} cores of an {model}" + (f" ({kind})" if kind else "")


def slug(device: str | None = None) -> str:
    """The machine's name, or that of its device, as part of a file's name."""
    kept = "".join(c if c.isalnum() else "-" for c in (device or name()).lower().replace("cores of an ", ""))
    return "-".join(part for part in kept.split("-") if part)


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    first = text.split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit(folder: Path) -> str | None:
    """The commit of the checkout a folder is in, with ``+`` if there are changes; None outside of one."""
    try:
        head = _git(folder, "rev-parse", "--short", "HEAD")
        return head + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *args: str) -> str:
    command = ["git", "-C", str(folder), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
