"""Run two models on the same input and compare, leaving no trace of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from ..errors import SurgeryError

# Float32 sums in another order, through a deep network; relative to the largest value of the output.
_TOLERANCE = 1e-3


@contextmanager
def _untouched(*models: Module) -> Iterator[None]:
    """Put modes, buffers and the random numbers' state back."""
    modules = [m for model in models for m in model.modules()]
    modes = [(m, m.training) for m in modules]
    buffers = [(b, b.detach().clone()) for m in modules for b in m._buffers.values() if b is not None]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for buffer, value in buffers:
                buffer.copy_(value)


def verify(model: Module, twin: Module, example: Any, training: bool) -> None:
    """Compare the outputs of two models on ``example``, in evaluation mode and, if asked, in training mode.

    Raises:
        SurgeryError: they differ, or one of them cannot run.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    for mode in (False, True) if training else (False,):
        outs = []
        for one in (model, twin):
            with _untouched(model, twin), torch.no_grad():
                torch.manual_seed(0)
                one.train(mode)
                try:
                    outs.append([t for t in tree_leaves(one(*inputs)) if isinstance(t, Tensor)])
                except Exception as error:
                    which = "given" if one is model else "converted"
                    raise SurgeryError(f"the {which} model fails on the example: {error}") from error
        for a, b in zip(*outs, strict=True):
            scale = float(a.abs().max()) if a.numel() else 0.0
            if a.shape != b.shape or not torch.allclose(a, b, rtol=0.0, atol=_TOLERANCE * max(scale, 1e-6)):
                name = "training" if mode else "evaluation"
                raise SurgeryError(f"the converted model gives other outputs on the example in {name} mode")
