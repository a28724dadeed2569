"""Norms that meet their convolution at some calls, as far as one can tell: folded at those calls alone.

The layer in front waits, as for ``convert(to="tune")``, until the model's own code goes on with its output.
If that is the norm, both are one operation with folded weights. Anything else gets the layer's own output. So
a path that nobody has run gives what the model's code says.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..accelerate.packed import Packed, Post
from ..conversion.convert import freeze
from ..conversion.fuse import fuse
from ..conversion.linear import TUNED
from ..epilogue import NOTHING, Epilogue, named
from ..graph.layers import hooked
from ..graph.method import is_plain
from .affine import Affine, NotExactError, Operation, fold_after
from .find import Linear, Norm
from .layers import Tail

_SETTINGS = ("stride", "padding", "dilation", "groups", "output_padding", "padding_mode")


class _Folded(NamedTuple):
    """A layer with folded weights, and what these were made of: tensors, their memory, how often written."""

    layer: nn.Module | None  # None: they do not fit the dtype
    settings: tuple[Any, ...]
    tensors: list[Tensor]
    memory: list[Tensor]
    versions: list[int]

    def is_of(self, settings: tuple[Any, ...], tensors: list[Tensor]) -> bool:
        """Whether they are what they were."""
        return settings == self.settings and all(
            a is b and a._version == version and a.data_ptr() == kept.data_ptr()
            for a, b, kept, version in zip(tensors, self.tensors, self.memory, self.versions, strict=True)
        )


class Guard:
    """What a layer does at a call that waited: it folds the frozen batch norm that has joined, if one has."""

    def __init__(self, op: Operation) -> None:
        self.op = op
        self.met: dict[tuple[nn.Module, str | None], _Folded] = {}

    def __deepcopy__(self, memo: Any) -> Self:
        return type(self)(self.op)

    def __reduce__(self) -> Any:
        return type(self), (self.op,)

    def __call__(self, pending: Any) -> Tensor | None:
        """The output of a call, with all that has joined it; None where the weights are not folded."""
        x, norm, activation = pending.x, pending.layer, pending.activation
        row = None if pending.residual is not None or activation is None else named(activation)
        inside = row is not None and row.onednn is not None and isinstance(pending.linear, Packed)
        folded = self._folded(pending.linear, norm, activation if inside else None, x)
        if folded is None:
            return None
        out: Tensor = folded(x)
        norm._check_input_dim(out)
        rest = Epilogue(None if inside else activation, pending.pool)
        return out if rest == NOTHING and pending.residual is None else rest.apply(out, pending.residual)

    def _folded(self, layer: Any, norm: Any, activation: str | None, x: Tensor) -> nn.Module | None:
        found = (layer._parameters, norm._parameters, norm._buffers)
        if not all(name in held for held in found[:2] for name in ("weight", "bias")):
            return None  # something computes them at each call
        tensors = [t for held in found for t in held.values() if t is not None]
        trains = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if trains or x.dim() != 2 + self.op.spatial or any(t.is_inference() for t in tensors):
            return None
        settings = (norm.eps, *map(vars(layer).get, _SETTINGS))
        kept = self.met.get((norm, activation))
        if kept is None or not kept.is_of(settings, tensors):
            with torch.inference_mode(False), torch.no_grad():
                made = self._made(layer, norm, activation)
            memory, versions = [t.detach() for t in tensors], [t._version for t in tensors]
            kept = self.met[norm, activation] = _Folded(made, settings, tensors, memory, versions)
        return kept.layer

    def _made(self, layer: Any, norm: Any, activation: str | None) -> nn.Module | None:
        affine = Affine.of(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
        try:
            exact = fold_after(self.op, layer.weight, layer.bias, affine)
        except NotExactError:
            return None
        rounded = [t.to(layer.weight.dtype) for t in exact]
        if not all(bool(t.isfinite().all()) for t in rounded):
            return None
        kind: Any = type(layer)
        twin: Any = kind.__new__(kind)
        vars(twin).update(vars(layer))
        weight, bias = (nn.Parameter(t, requires_grad=False) for t in rounded)
        twin._parameters = {"weight": weight, "bias": bias}
        if not isinstance(layer, Packed):
            return twin  # type: ignore[no-any-return]
        row = None if activation is None else named(activation)
        post = Post() if row is None or row.onednn is None else Post(*row.onednn)
        packed: nn.Module = kind.of(twin, [] if activation is None else [Tail(activation, None)], post)
        return packed


def guard(model: nn.Module, meetings: Iterable[tuple[Norm, Linear]]) -> dict[Norm, Guard]:
    """Let the layers of ``model`` fold the norms that they meet; what was made for each norm."""
    made: dict[Norm, Guard] = {}
    for norm, linear in meetings:
        layer, module = model.get_submodule(linear.call.forward.path), model.get_submodule(norm.path)
        if is_plain(layer) and not hooked(layer) and not hooked(module) and not freeze(module):
            made[norm] = vars(layer)[TUNED] = Guard(linear.op)
    if made:
        fuse(model)
    return made
