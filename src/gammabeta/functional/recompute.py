"""Outputs that are not kept for the backward pass: it computes them again, or never reads them.

The operation after a batch norm saves the batch norm's output: a convolution for the gradient of its weight,
max pooling for the shape alone. When the next batch norm of ours is called, it follows the graph behind its
input back to that operation. It registers hooks at the saved tensor if the node of the batch norm before says
that the output can be computed again. No state is global: each graph carries its own, and other hooks and
other threads are not affected.

An output is computed again from what its batch norm has saved anyway, by the evaluation kernel with the
batch's statistics: one more pass over the tensor, and the same bits. Because it is read from there, torch
checks that neither input nor parameters were changed in between.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.backend import Normalized
from .autograd import kernel_call, saved

_MOST_PASSES = 2  # an output whose residual is computed again too costs two; a third would run up a chain
_FARTHEST = 4  # operations between two batch norms, at most
_RESIDUAL = 3  # its place among what `autograd.save` keeps
_SEEN = "gammabeta"
_POOL = "MaxPool2DWithIndicesBackward0"
# By kind of node: the name of the input it saves, "" if none, and the edge to where that was made.
_EDGES = {
    "ConvolutionBackward0": ("input", 0),
    "AddmmBackward0": ("mat1", 1),
    _POOL: ("self", 0),
    "AvgPool2DBackward0": ("", 0),
    "CatBackward0": ("", -1),
}


class Output(NamedTuple):
    """What the node of a batch norm in the graph says of an output that may be computed again."""

    address: int
    version: int
    passes: int  # over a tensor, to compute it; at most `_MOST_PASSES`


def spare(out: Tensor, x: Tensor, residual: Any, recompute: bool) -> None:
    """Drop what was saved before ``x``, where possible, and note whether ``out`` can be computed again.

    Args:
        out: what a layer returned.
        x: its input, as the layer was given it.
        residual: likewise.
        recompute: whether ``out`` may be computed again instead of kept.
    """
    if torch.compiler.is_compiling():
        return
    before: Any = x.grad_fn
    if before is not None and x.is_cpu:
        _spare_before(before)
    if recompute:
        node: Any = out.grad_fn
        if getattr(node, "backend", None) is not None and out.is_cpu and not _hooked():
            _describe(node, out, residual)


def _hooked() -> bool:
    """Whether the user's hooks, or those of activation checkpointing, handle what is saved."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None  # an older torch cannot tell


def _describe(node: Any, out: Tensor, residual: Any) -> None:
    """Note at the node that its output can be computed again; drop its residual if that can be, too."""
    if node.only_added:
        return  # the residual is not saved
    passes = 1
    before = getattr(getattr(residual, "grad_fn", None), "output", None)
    if before is not None and _is_output(node.saved_tensors[_RESIDUAL], before):
        node._raw_saved_tensors[_RESIDUAL].register_hooks(_forget, partial(_again, residual.grad_fn))
        passes += before.passes
    if passes <= _MOST_PASSES:
        node.output = Output(out.data_ptr(), out._version, passes)


def _spare_before(node: Any) -> None:
    """Follow the graph from a batch norm's input back to the batch norm before it."""
    for _ in range(_FARTHEST):
        kind = type(node).__name__
        found = _EDGES.get(kind)
        if found is None:
            return
        name, edge = found
        maker = node.next_functions[edge][0]
        output = getattr(maker, "output", None)
        if name and (output is not None or kind == _POOL) and _SEEN not in node.metadata:
            _spare_saved(node, name, maker, output)
        if output is not None or maker is None:
            return
        node = maker


def _spare_saved(node: Any, name: str, maker: Any, output: Output | None) -> None:
    """Replace what ``node`` has saved: the output of ``maker``, or anything if only its shape matters."""
    node.metadata[_SEEN] = True
    if _hooked():
        return
    try:
        kept = getattr(node, f"_saved_{name}")
        register = getattr(node, f"_raw_saved_{name}").register_hooks
        if type(node).__name__ == _POOL:
            if _only_shape_matters():
                shape, strides, dtype = kept.shape, kept.stride(), kept.dtype
                register(_forget, lambda _: torch.empty_strided(shape, strides, dtype=dtype))
        elif output is not None and _is_output(kept, output):
            register(_forget, partial(_again, maker))
    except RuntimeError:  # changed in place, which the backward pass reports; or the user has hooks there
        return


def _is_output(saved: Tensor, output: Output) -> bool:
    return saved.data_ptr() == output.address and saved._version == output.version


def _forget(saved: Tensor) -> None:
    """What a hook keeps of a tensor."""


def _again(node: Any, _: None) -> Tensor:
    """The output of a batch norm, computed again each time it is needed.

    Keeping it until the batch norm's own backward pass would save a pass or two in a residual network, and
    raise the peak by a block's output.
    """
    kept = saved(node)
    with torch.no_grad():
        again: Tensor = node.backend.forward(Normalized(kernel_call(kept.call), kept.mean, kept.invstd))
    return again


@cache
def _only_shape_matters() -> bool:
    """Whether max pooling's backward pass leaves the values of its input alone, as it does in torch 2.13."""
    x = torch.arange(16.0).view(1, 1, 4, 4).requires_grad_()
    with torch.enable_grad():
        out = F.max_pool2d(x, 2)
        node: Any = out.grad_fn
        node._raw_saved_self.register_hooks(_forget, lambda _: torch.full_like(x, torch.nan))
        (found,) = torch.autograd.grad(out.sum(), x)
    return found.flatten().tolist() == [float(place in (5, 7, 13, 15)) for place in range(16)]
