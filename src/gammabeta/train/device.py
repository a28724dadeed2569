"""Where a training runs and in which precision."""

from typing import Literal

import torch
from torch import nn

from ..errors import UnavailableError, UsageError

Precision = Literal["fp32", "bf16"]


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device for ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:<index>``.

    Raises:
        UsageError: The name is none of these.
        UnavailableError: CUDA was asked for and is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise UsageError(f"unknown device {name!r}: choose auto, cpu, cuda or cuda:<index>")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = (
            "this PyTorch was built without CUDA" if torch.version.cuda is None else "no usable GPU was found"
        )
        raise UnavailableError(f"device {name} is not available: {why}; use --device cpu")
    if int(index or 0) >= torch.cuda.device_count():
        raise UnavailableError(f"device {name} does not exist: there are {torch.cuda.device_count()} GPUs")
    return torch.device(name)


def computes_bf16(device: torch.device) -> bool:
    """Tell whether the processor multiplies in bfloat16, rather than emulating it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capable = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(capable())


def resolve_precision(wanted: str, device: torch.device) -> Precision:
    """Return the precision for ``auto`` (bf16 where the device computes in it), ``fp32`` or ``bf16``."""
    if wanted == "auto":
        return "bf16" if computes_bf16(device) else "fp32"
    if wanted not in ("fp32", "bf16"):
        raise UsageError(f"unknown precision {wanted!r}: choose auto, fp32 or bf16")
    return "bf16" if wanted == "bf16" else "fp32"


def place_model(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to a device, its convolutions in channels_last, the layout they are quickest in."""
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
