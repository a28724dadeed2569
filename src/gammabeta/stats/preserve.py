"""Run a model without leaving a trace: everything a forward pass may change is put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# What a batch-normalization layer's forward reads from its attributes, and what we set while measuring.
_ATTRIBUTES = ("training", "momentum", "track_running_stats")


@contextmanager
def preserved(model: nn.Module, loader: Any = None) -> Iterator[None]:
    """Put back modes, momentum, every buffer's identity and bits, and the random state, whatever happens.

    Buffers are restored in place, so that views and shared storage stay connected. Parameters are not copied:
    no forward pass under ``torch.no_grad`` changes them. Tensors kept as plain attributes, or in a plain
    dictionary of the module, count as buffers: statistics written by hand often live there. ``loader`` may
    bring random generators of its own.
    """
    attributes = [
        (module, {key: module.__dict__[key] for key in _ATTRIBUTES if key in module.__dict__})
        for module in model.modules()
    ]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    plain = [(values, dict(values)) for values in _dictionaries(model)]
    hidden = [tensor for values, _ in plain for tensor in values.values() if isinstance(tensor, Tensor)]
    saved = [(tensor, tensor.detach().clone()) for tensor in (*model.buffers(), *hidden)]
    randomness = RandomState.of(loader)
    try:
        yield
    finally:
        randomness.restore()
        for module, values in attributes:
            module.__dict__.update(values)
        for module, tensors in buffers:
            module._buffers.clear()
            module._buffers.update(tensors)
        for current, values in plain:
            for key, value in values.items():
                if isinstance(value, Tensor):
                    current[key] = value
        for tensor, copy in saved:
            restore(tensor, copy)


def _dictionaries(model: nn.Module) -> Iterator[dict[Any, Any]]:
    """Each module's attributes, and the plain dictionaries of tensors among them."""
    for module in model.modules():
        yield module.__dict__
        for key, value in module.__dict__.items():
            if isinstance(value, dict) and not key.startswith("_"):
                yield value


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


@dataclass(frozen=True)
class RandomState:
    """Every generator that a forward pass or a loader may draw from, as it stands."""

    torch_cpu: Tensor
    torch_cuda: list[Tensor]
    python: Any
    numpy: Any
    own: tuple[tuple[torch.Generator, Tensor], ...]

    @classmethod
    def of(cls, loader: Any = None) -> RandomState:
        """The global generators, and those that ``loader`` and its samplers bring along."""
        batch_sampler = getattr(loader, "batch_sampler", None)
        holders = (loader, getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None))
        own = {id(g): g for g in (getattr(holder, "generator", None) for holder in holders)}
        return cls(
            torch.get_rng_state(),
            torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            random.getstate(),
            np.random.get_state(),  # noqa: NPY002 (the global one is what a loader's transforms use)
            tuple((g, g.get_state()) for g in own.values() if isinstance(g, torch.Generator)),
        )

    def restore(self) -> None:
        """Put all of them back to this state."""
        torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda:
            torch.cuda.set_rng_state_all(self.torch_cuda)
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
        for generator, state in self.own:
            generator.set_state(state)
