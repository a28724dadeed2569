"""Run a model without leaving a trace: everything a forward pass may change is put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# What a batch-normalization layer's forward reads from its attributes, and what we set while measuring.
_ATTRIBUTES = ("training", "momentum", "track_running_stats")


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put back modes, momentum, every buffer's identity and bits, and the random state, whatever happens.

    Buffers are restored in place, so that views and shared storage stay connected. Parameters are not copied:
    no forward pass under ``torch.no_grad`` changes them.
    """
    attributes = [
        (module, {key: module.__dict__[key] for key in _ATTRIBUTES if key in module.__dict__})
        for module in model.modules()
    ]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    saved = [(tensor, tensor.detach().clone()) for tensor in model.buffers()]
    randomness = _random_state()
    try:
        yield
    finally:
        _set_random_state(randomness)
        for module, values in attributes:
            module.__dict__.update(values)
        for module, tensors in buffers:
            module._buffers.clear()
            module._buffers.update(tensors)
        for tensor, copy in saved:
            restore(tensor, copy)


def set_modes(model: nn.Module, *, training: bool) -> None:
    """Set every module's mode without calling ``train()``, which some models override to do more."""
    for module in model.modules():
        module.training = training


def restore(tensor: Tensor, copy: Tensor) -> None:
    """Write ``copy`` back into ``tensor``, where it differs (comparing bits, so that NaN equals NaN)."""
    if same_bits(tensor, copy):
        return
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(copy)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.detach().contiguous().view(integer), b.detach().contiguous().view(integer))


def _random_state() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    # NumPy's global generator is the one that a loader's transforms draw from.
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()  # noqa: NPY002


def _set_random_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])
    random.setstate(state[2])
    np.random.set_state(state[3])  # noqa: NPY002
