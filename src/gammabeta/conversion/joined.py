"""What has joined a call of a batch norm: while a model runs, and as far as its source tells before."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import Module

from ..epilogue import Epilogue, Pool
from .steps import Step


class Joined:
    """What has joined a call of a batch norm so far, in order: a residual, an activation, a pooling."""

    # Not set in __init__: one is made at each call of a rewritten batch norm.
    layer: Any = None
    linear: Any = None  # of a convolution or Linear that waits for a frozen batch norm: the module
    residual: Any = None
    activation: str | None = None
    slope: Tensor | None = None  # of the activation "prelu", which learns it
    pool: Pool = None
    out: Tensor | None = None  # once it has run: then nothing joins any more

    @property
    def images(self) -> bool:
        """Whether the layer normalises images; pooling is for these alone."""
        raise NotImplementedError

    def joins(self, step: Step) -> bool:
        """Take one more step in, if it can follow those that are in already, and nothing has run."""
        kind, setting = step
        if self.out is not None:
            return False
        if kind == "nothing":
            return True
        if kind == "norm":
            if self.linear is None or self.layer is not None:
                return False
            self.layer = setting
            return True
        if self.linear is not None and self.layer is None:
            return False
        if self.pool is not None:
            return False
        if kind == "activation":
            if self.activation is not None:
                return False
            self.activation = setting
        elif kind == "prelu":
            if self.activation is not None or self.residual is not None or self.linear is not None:
                return False
            self.activation, self.slope = kind, setting
        elif kind == "residual":
            if self.residual is not None or self.activation is not None:
                return False
            self.residual = setting
        else:
            if not self.images or self.slope is not None:
                return False
            self.pool = setting
        return True

    def __str__(self) -> str:
        parts = [type(self.linear).__name__] if self.linear is not None and self.layer is not None else []
        parts += ["residual"] if self.residual is not None else []
        epilogue = str(Epilogue(self.activation, self.pool))
        return " + ".join([*parts, epilogue] if epilogue else parts)


class Described(Joined):
    """What is known before a run of a layer's call: what will join it."""

    def __init__(self, layer: Module | None) -> None:
        super().__init__()
        self.layer = layer

    @property
    def images(self) -> bool:
        """Whether the layer, if it is known, is one for images."""
        known = isinstance(self.layer, nn.modules.batchnorm._NormBase)
        return not known or isinstance(self.layer, nn.BatchNorm2d | nn.LazyBatchNorm2d)

    def again(self) -> "Described":
        """Another call of the same kind."""
        twin = Described(self.layer)
        twin.linear = self.linear
        twin.residual, twin.activation, twin.pool = self.residual, self.activation, self.pool
        return twin


@dataclass
class Outlook:
    """What a rewritten method will do, as far as it can be told."""

    fused: dict[Module, tuple[str, str]] = field(default_factory=dict)  # what joins, and why not more
    returned: Described | None = None
    written: set[Module] = field(default_factory=set)  # torch's layers whose tail the method computes
    functional: bool = False  # whether it calls torch's function batch_norm
    returns_waiting: bool = False  # whether what it returns may be a waiting call, in some run
