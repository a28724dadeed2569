"""Random numbers that a model draws: the same ones again, or others.

Two runs are compared with the same numbers drawn in both. What differs then is not the noise of a variational
autoencoder, of Monte Carlo dropout, or of augmentation at test time.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ..stats.preserve import remember_random_state


@contextmanager
def drawn_from(seed: int, model: nn.Module) -> Iterator[None]:
    """The model draws what follows from ``seed``; then every generator goes on where it was."""
    with generators_kept(model):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 (the global one is what models draw from)
        for generator in _generators(model):
            _seed(generator, seed)
        yield


@contextmanager
def generators_kept(model: nn.Module) -> Iterator[None]:
    """Put back the global generators and those of the model."""
    put_back = [remember_random_state(), *map(_remembered, _generators(model))]
    try:
        yield
    finally:
        for restore in put_back:
            restore()


def _generators(model: nn.Module) -> Iterator[Any]:
    """Generators that modules hold as attributes."""
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, kinds))


def _remembered(generator: Any) -> Callable[[], object]:
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return lambda: generator.set_state(state)
    if isinstance(generator, np.random.Generator):
        bits, kept = generator.bit_generator, generator.bit_generator.state
        return lambda: setattr(bits, "state", kept)
    if isinstance(generator, np.random.RandomState):
        numbers = generator.get_state()
        return lambda: generator.set_state(numbers)
    words = generator.getstate()
    return lambda: generator.setstate(words)


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    else:
        generator.seed(seed)
