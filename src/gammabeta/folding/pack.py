"""Find the convolutions and Linears to serve from packed weights, and what moves into each.

What follows a layer moves into it only where the one run recorded shows that nothing else reads what passes
between, and torch.fx that every input flows so.
"""

import copy
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..accelerate.convolution import PackedConv2d
from ..accelerate.packed import PackedLinear, Post
from ..epilogue import ACTIVATIONS, activation_of_module
from ..graph.hooks import hooked
from ..graph.layers import replace_module, sharing_copy
from ..graph.record import Forward, Recording, record, tensors_in
from .find import flows_alike, is_known_norm
from .layers import Tail
from .verify import Inputs

_SMALL_LINEAR = 1 << 14  # elements of a weight too small for oneDNN to pay at usual batch sizes


@dataclass
class Site:
    """One layer to pack: its path, and the paths of the modules that move into it, in order."""

    path: str
    layer: nn.Conv2d | nn.Linear
    after: list[str] = field(default_factory=list)
    post: Post = field(default_factory=Post)
    pool: bool = False

    def build(self, model: nn.Module) -> PackedConv2d | PackedLinear:
        """Make the packed layer."""
        after = [model.get_submodule(path) for path in self.after]
        if isinstance(self.layer, nn.Conv2d):
            return PackedConv2d.of(self.layer, after, self.post, self.pool)
        return PackedLinear.of(self.layer, after, self.post)


def packed_copy(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a copy of an evaluation-mode ``model`` that serves from packed weights, and what was packed.

    The copy shares the parameters of ``model``.
    """
    packed = sharing_copy(model)
    args, kwargs = copy.deepcopy(inputs)
    recording = record(packed, lambda: packed(*args, **kwargs), is_known_norm)
    sites = _find_sites(packed, recording, flows_alike(packed))
    for site in sites:
        packed = _carry_out(packed, site)
    return packed, tuple(site.path or type(site.layer).__name__ for site in sites)


def _find_sites(model: nn.Module, recording: Recording, every_input: bool) -> list[Site]:
    """Every layer to pack; ``every_input``: every input flows as the one recorded."""
    calls = Counter(forward.module for forward in recording.forwards)
    sites = []
    for path, module in model.named_modules():
        if not _packable(module) or not calls[module]:
            continue
        site = Site(path, module)
        if every_input and calls[module] == 1:
            _move_in(site, recording.forwards_of(module)[0], calls)
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


def _move_in(site: Site, forward: Forward, calls: Counter[nn.Module]) -> None:
    """Walk on from what the layer gives, while one module alone reads it and the layer can do its work."""
    while len(forward.outputs) == 1:
        value = forward.outputs[0]
        if value.watchers or len(value.users) != 1:
            return
        reader = value.users[0].forward
        if reader.inputs != [value] or calls[reader.module] != 1 or reader.given != (1, ()):
            return
        if not _moves(site, reader.module):
            return
        site.after.append(reader.path)
        forward = reader


def _moves(site: Site, module: nn.Module) -> bool:
    """Note what the module does, if the layer can do it after what it does already."""
    fresh = site.post == Post() and not site.pool
    pools = isinstance(site.layer, nn.Conv2d) and not site.pool
    if type(module) is Tail:
        post = _named(module.activation) if module.activation else Post()
        if not fresh or post is None or module.pool not in (None, 2) or (module.pool and not pools):
            return False
        site.post, site.pool = post, bool(module.pool)
        return True
    if type(module) is nn.AvgPool2d:
        site.pool = pools and _halves(module)
        return site.pool
    post = _post(module)
    if not fresh or post is None:
        return False
    site.post = post
    return True


def _named(activation: str) -> Post | None:
    """An activation of ours as oneDNN's, if it has it."""
    known = ACTIVATIONS[activation].onednn
    return None if known is None else Post(*known)


def _post(module: nn.Module) -> Post | None:
    """What a module computes as oneDNN's; that takes settings of two activations which ours do not have."""
    if type(module) is nn.LeakyReLU:
        return Post("leaky_relu", (float(module.negative_slope),))
    if type(module) is nn.GELU:
        return Post("gelu", (), module.approximate)
    name = activation_of_module(module)
    return None if name is None else _named(name)


def _halves(pool: nn.AvgPool2d) -> bool:
    """Tell whether it is the mean over 2x2 windows, side by side."""

    def pair(value: object) -> object:
        return value if isinstance(value, tuple) else (value, value)

    return (
        pair(pool.kernel_size) == pair(pool.stride) == (2, 2)
        and pair(pool.padding) == (0, 0)
        and not pool.ceil_mode
        and pool.divisor_override in (None, 4)
    )


def _carry_out(model: nn.Module, site: Site) -> nn.Module:
    """Put the packed layer in place, and nothing where what moved into it stood."""
    made = site.build(model)
    for path in site.after:
        model = replace_module(model, path, nn.Identity())
    return replace_module(model, site.path, made)


def layouts(model: nn.Module, inputs: Inputs) -> list[tuple[int, ...]]:
    """The strides of every tensor of the result."""
    args, kwargs = copy.deepcopy(inputs)
    with torch.no_grad():
        result: list[Tensor] = list(tensors_in(model(*args, **kwargs)))
    return [tensor.stride() for tensor in result]
