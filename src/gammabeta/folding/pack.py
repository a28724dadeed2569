"""Find the convolutions and Linears to serve from packed weights, and what moves into each.

What follows a layer moves into it only where the one run recorded shows that nothing else reads what passes
between, and the source that this is so on every path.
"""

import copy
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.utils import _pair

from ..accelerate.convolution import PackedConv2d
from ..accelerate.packed import PackedLinear, Post
from ..epilogue import activation_of_module, named
from ..graph.layers import hooked, replace_module, sharing_copy
from ..graph.paths import Paths
from ..graph.record import Forward, Inputs, Recording, record, tensors_in
from ..stats.preserve import preserved
from .find import is_known_norm
from .layers import Tail

_SMALL_LINEAR = 1 << 14  # elements of a weight too small for oneDNN to pay at usual batch sizes


@dataclass
class Site:
    """One layer to pack: its path, and the paths of the modules that move into it, in order."""

    path: str
    layer: nn.Conv2d | nn.Linear
    after: list[str] = field(default_factory=list)
    post: Post = field(default_factory=Post)
    pool: bool = False


def packed_copy(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a copy of an evaluation-mode ``model`` that serves from packed weights, and what was packed.

    The copy shares the parameters of ``model``.
    """
    packed = sharing_copy(model)
    args, kwargs = copy.deepcopy(inputs)
    with preserved(packed):
        recording = record(packed, lambda: packed(*args, **kwargs), is_known_norm)
    sites = _find_sites(packed, recording)
    for site in sites:
        kind = PackedConv2d if isinstance(site.layer, nn.Conv2d) else PackedLinear
        after = [packed.get_submodule(path) for path in site.after]
        made = kind.of(site.layer, after, site.post, site.pool)
        for path in site.after:
            packed = replace_module(packed, path, nn.Identity())
        packed = replace_module(packed, site.path, made)
    return packed, tuple(site.path or type(site.layer).__name__ for site in sites)


def _find_sites(model: nn.Module, recording: Recording) -> list[Site]:
    """Every layer to pack."""
    paths = Paths(model)
    calls = Counter(forward.module for forward in recording.forwards)
    last = {forward.module: forward for forward in recording.forwards}
    sites = []
    for path, module in model.named_modules():
        if not _packable(module) or not calls[module]:
            continue
        site = Site(path, module)
        if calls[module] == 1:
            _move_in(site, last[module], calls, paths)
        sites.append(site)
    return sites


def _packable(module: nn.Module) -> bool:
    """Exactly torch's layer, its parameters plain float32 on the CPU, without hooks."""
    if type(module) is nn.Conv2d:
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return False
    elif type(module) is not nn.Linear or module.weight.numel() < _SMALL_LINEAR:
        return False
    if hooked(module) or module._parameters.get("weight") is None:
        return False
    return all(
        type(t) is nn.Parameter and t.is_cpu and t.dtype is torch.float32 and t.layout is torch.strided
        for t in module._parameters.values()
        if t is not None
    )


def _move_in(site: Site, forward: Forward, calls: Counter[nn.Module], paths: Paths) -> None:
    """Walk on from what the layer gives, while one module alone reads it and the layer can do its work."""
    while len(forward.outputs) == 1:
        value = forward.outputs[0]
        if value.watchers or len(value.users) != 1:
            return
        reader = value.users[0].forward
        if reader.inputs != [value] or calls[reader.module] != 1 or reader.given != (1, ()):
            return
        if paths.part(forward.module, reader.module) or not _moves(site, reader.module):
            return
        site.after.append(reader.path)
        forward = reader


def _moves(site: Site, module: nn.Module) -> bool:
    """Note what the module does, if the layer can do it after what it does already."""
    found = _work(module)
    if found is None or site.pool:
        return False
    post, pool = found
    activates_twice = post != Post() and site.post != Post()
    if activates_twice or (pool and not isinstance(site.layer, nn.Conv2d)):
        return False
    site.post, site.pool = (site.post if post == Post() else post), pool
    return True


def _work(module: nn.Module) -> tuple[Post, bool] | None:
    """The activation, as oneDNN's, and the 2x2 mean that a module computes; None if it does anything else."""
    if type(module) is nn.AvgPool2d:
        return (Post(), True) if _halves(module) else None
    pool = None
    if type(module) is Tail:
        name, pool = module.activation, module.pool
        if name is None and pool in (None, 2):
            return Post(), pool == 2
    else:
        name = activation_of_module(module)
    row = None if name is None else named(name)
    if row is None or row.onednn is None or pool not in (None, 2):
        return None
    return Post(*row.onednn), pool == 2


def _halves(pool: nn.AvgPool2d) -> bool:
    """Tell whether it is the mean over 2x2 windows, side by side."""
    return (
        _pair(pool.kernel_size) == _pair(pool.stride) == (2, 2)
        and _pair(pool.padding) == (0, 0)
        and not pool.ceil_mode
        and pool.divisor_override in (None, 4)
    )


def layouts(model: nn.Module, inputs: Inputs) -> list[tuple[int, ...]]:
    """The strides of every tensor of the result."""
    args, kwargs = copy.deepcopy(inputs)
    with preserved(model), torch.no_grad():
        return [tensor.stride() for tensor in tensors_in(model(*args, **kwargs))]
