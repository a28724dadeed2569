"""Run a model without leaving a trace: everything a forward pass may change is put back."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..graph.layers import BatchNormLayer

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
    modules = [module.__dict__ for module in model.modules()]
    attributes = [(values, {key: values[key] for key in _ATTRIBUTES if key in values}) for values in modules]
    buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    plain = [
        (values, {key: value for key, value in values.items() if isinstance(value, Tensor)})
        for values in _dictionaries(model)
    ]
    hidden = [tensor for _, tensors in plain for tensor in tensors.values()]
    saved = [(tensor, tensor.detach().clone()) for tensor in (*model.buffers(), *hidden)]
    put_back_random_state = remember_random_state(loader)
    try:
        yield
    finally:
        put_back_random_state()
        for tensors, before in buffers:
            tensors.clear()
            tensors.update(before)
        for values, kept in (*attributes, *plain):
            values.update(kept)
        for tensor, copy in saved:
            overwrite(tensor, copy)


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


def overwrite(tensor: Tensor, values: Tensor) -> None:
    """Write ``values`` into ``tensor`` in place, if they differ (comparing bits, so that NaN equals NaN)."""
    if not same_bits(tensor, values):
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(values)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.detach().contiguous().view(integer), b.detach().contiguous().view(integer))


def remember_random_state(loader: Any = None) -> Callable[[], None]:
    """Remember every generator that a forward pass or a loader may draw from; the result puts them back.

    These are the global ones, and those that ``loader`` and its samplers bring along.
    """
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    python = random.getstate()
    numpy = np.random.get_state()  # noqa: NPY002 (the global one is what a loader's transforms use)
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None))
    generators = (getattr(holder, "generator", None) for holder in holders)
    own = [(g, g.get_state()) for g in generators if isinstance(g, torch.Generator)]

    def put_back() -> None:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for generator, state in own:
            generator.set_state(state)

    return put_back


@contextmanager
def observed(layers: dict[str, BatchNormLayer], record: Callable[[str, Any, Tensor], None]) -> Iterator[None]:
    """Call ``record(name, layer, x)`` with every input ``x`` of these layers, before they see it."""

    def hook(name: str, layer: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        record(name, layer, inputs[0] if inputs else next(iter(keywords.values())))

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(hook, name), with_kwargs=True))
        yield
