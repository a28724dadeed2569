"""Which code, versions and machine made a run."""

import os
import platform
import socket
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..text import storable
from .world import computes_bf16

_PACKAGES = ("torch", "numpy", "numba", "llvmlite", "triton", "safetensors", "onnxruntime")


def versions() -> dict[str, str]:
    """Return the versions of gammabeta, Python and the packages that compute, those installed only."""
    found = {"gammabeta": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def processor() -> str:
    """Return the processor's name as the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Return the machine: system, processor, cores, instruction set, memory and GPUs."""
    memory = None
    with suppress(AttributeError, OSError, ValueError):
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    info: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "computes_bf16": computes_bf16(torch.device("cpu")),
        "memory_gib": memory,
        "gpus": [],
    }
    if torch.cuda.is_available():
        info["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        info["cuda"] = torch.version.cuda
    return info


def commit() -> str | None:
    """Return the git commit of this package's checkout, ``-dirty`` if changed; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        tracked = _git(here, "ls-files", "--error-unmatch", Path(__file__).name)
        described = _git(here, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None
    return described if tracked else None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
    return done.stdout.strip()


def provenance() -> dict[str, Any]:
    """Return everything that says how a run came about."""
    return {
        "versions": versions(),
        "commit": commit(),
        "machine": machine(),
        "command": [storable(word) for word in (Path(sys.argv[0]).name, *sys.argv[1:])],
        "torchrun": torchrun_job(),
    }


def torchrun_job() -> dict[str, str] | None:
    """Return what identifies the job of ``torchrun`` that started this process; None without torchrun.

    ``agent`` is the torchrun process on this machine, its number and when it began. The ``run_id`` is
    ``"none"`` unless one was given.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None:
        return None
    agent = os.getppid()
    began = ""
    with suppress(OSError):  # field 22 of proc(5), in ticks since the machine started
        began = Path(f"/proc/{agent}/stat").read_text("utf-8").rpartition(")")[2].split()[19]
    return {"run_id": run_id, "host": socket.gethostname(), "agent": f"{agent}@{began}"}
