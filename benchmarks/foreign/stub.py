"""Stands in for torchvision where it is missing, so that ``import timm`` works.

timm's models need one class of torchvision; everything else that timm imports from there is for pictures. The
stand-in gives that class, and an empty class for every other name.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_MODULES = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.utils",
)


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose weights and statistics are buffers and never change."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, fill in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), fill))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class _Names(type):
    """An empty class's attributes are their names: for enumerations."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("_"):
            raise AttributeError(name)
        return name


class _StandIn(ModuleType):
    """A module in which every public name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Names(name, (), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


@contextmanager
def installed() -> Iterator[None]:
    """Python finds the stand-in for torchvision meanwhile, unless torchvision is installed.

    Not for longer: who asks later whether torchvision is there must get the true answer.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        yield
        return
    for name in _MODULES:
        module = _StandIn(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = FrozenBatchNorm2d  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name in _MODULES:
            del sys.modules[name]


def import_timm() -> ModuleType:
    """Import timm, with the stand-in where torchvision is missing.

    Raises:
        ImportError: timm itself, or what else it needs, is not installed.
    """
    with installed():
        return importlib.import_module("timm")
