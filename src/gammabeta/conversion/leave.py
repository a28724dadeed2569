"""A way out of batch norm: group, instance or layer normalization that keeps what the network has learned.

These normalise each sample by itself (Wu and He 2018, "Group normalization", equations 1 to 7): they need no
running statistics, do the same in training and evaluation, and give the gradient of each sample. They compute
something else than batch norm: γ and β are fitted so that each layer's output comes as near as it can.
"""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import SurgeryError, UsageError
from ..graph.layers import BatchNormLayer
from ..stats.batches import call, placement, whole_batches
from ..stats.preserve import preserved, set_modes
from .adapters import tail_of

M = TypeVar("M", bound=nn.Module)
OTHERS = ("group", "instance", "layer")
_FEWEST_CHANNELS = 4  # of a group; one channel for itself would lose how large it is beside the others
_FITTING_SAMPLES = 512  # two numbers a channel need no more
_SWEEPS = 2


@dataclass(frozen=True)
class Replacement:
    """One batch norm that was replaced.

    Attributes:
        layer: its name in ``model.named_modules()``.
        groups: groups of channels that are normalised together.
        explained: the share of the variance of the old layer's output that the fitted γ and β reproduce, on
            the data given; None without data.
    """

    layer: str
    groups: int
    explained: float | None = None


@dataclass
class ReplacementReport:
    """What ``convert(to="group" | "instance" | "layer")`` did; ``str()`` of it is a table.

    Attributes:
        to: what was asked for.
        replaced: the batch norms that were replaced, in the model's order.
        left: the names of those that were not, each with the reason.
        standardized: the names of the convolutions whose weights are standardised.
    """

    to: str
    replaced: list[Replacement] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    standardized: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        width = max(len(name) for name in ("layer", "(model)", *(r.layer for r in self.replaced)))
        lines = [f"{'layer'.ljust(width)}  groups  variance explained"]
        for r in self.replaced:
            share = "not fitted" if r.explained is None else f"{r.explained:.1%}"
            lines.append(f"{(r.layer or '(model)').ljust(width)}  {r.groups:6d}  {share}")
        lines.append(f"{len(self.replaced)} batch norms became {self.to} norms")
        lines += [f"left: {name or '(model)'}: {why}" for name, why in self.left.items()]
        if self.standardized:
            lines.append(f"weights standardized: {len(self.standardized)} convolutions")
        return "\n".join(lines)


def leave(model: M, to: str, *, groups: int, fit: Iterable[Any] | None, standardize: bool) -> M:
    """Return a copy of a model of PyTorch's layers with other norms; ``convert`` documents the arguments."""
    if groups < 1:
        raise UsageError(f"groups must be at least 1, not {groups}")
    if isinstance(fit, Iterator):
        raise UsageError("fit= is passed over once for each layer: give a loader or a list, not an iterator")
    new = copy.deepcopy(model)
    report = ReplacementReport(to)
    if standardize:
        report.standardized = _standardize(new)
    replaced: dict[str, nn.GroupNorm] = {}
    for name, layer in list(new.named_modules()):
        if isinstance(layer, BatchNormLayer):
            tail = _tail(layer)
            if tail is None:
                report.left[name] = (
                    f"{type(layer).__name__} is a class of its own, with a forward that may do more"
                )
                continue
            replaced[name] = norm = _norm(layer, to, groups)
            new = _put(new, name, nn.Sequential(OrderedDict(norm=norm, **tail)) if tail else norm)
    explained: dict[str, float] = {}
    if fit is not None and replaced:
        explained = _Fitting(model, new, fit).run(replaced)
    report.replaced = [
        Replacement(name, norm.num_groups, explained.get(name)) for name, norm in replaced.items()
    ]
    vars(new)["conversion_report"] = report
    return new


def _tail(layer: nn.Module) -> dict[str, nn.Module] | None:
    """The modules that a batch norm of another library calls behind the normalisation; None if not known."""
    names = tail_of(layer)
    if names is None:
        return None
    parts = {name: getattr(layer, name, None) for name in names}
    modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    return modules if len(modules) == len(parts) else None


def _norm(layer: Any, to: str, groups: int) -> nn.GroupNorm:
    channels = layer.num_features
    if not channels:
        raise SurgeryError("a batch norm does not know its size yet: run the model once, then convert")
    most = {"instance": channels, "layer": 1}.get(to) or max(1, min(groups, channels // _FEWEST_CHANNELS))
    count = next(g for g in range(most, 0, -1) if channels % g == 0)
    place = next(
        (t for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()), torch.zeros(())
    )
    norm = nn.GroupNorm(count, channels, layer.eps, device=place.device, dtype=place.dtype)
    with torch.no_grad():
        for name in ("weight", "bias"):
            if getattr(layer, name, None) is not None:
                getattr(norm, name).copy_(getattr(layer, name))
    norm.train(layer.training)
    return norm


def _put(model: Any, name: str, norm: nn.Module) -> Any:
    if not name:
        return norm
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, norm)
    return model


class _Standardized(nn.Module):
    """A convolution's weight with mean 0 and a fixed deviation for each output (Qiao et al. 2019, eq. 5).

    The deviation is the one that the weight had, where the paper has 1, so that little changes at first.
    """

    deviation: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.axes = tuple(range(1, weight.dim()))
        self.register_buffer("deviation", weight.detach().std(self.axes, correction=0, keepdim=True))

    def forward(self, weight: Tensor) -> Tensor:
        centred = weight - weight.mean(self.axes, keepdim=True)
        return centred * (self.deviation / (weight.std(self.axes, correction=0, keepdim=True) + 1e-12))


def _standardize(model: nn.Module) -> list[str]:
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, convolutions) and module.weight[0].numel() > 1
    ]
    for _, module in found:
        parametrize.register_parametrization(module, "weight", _Standardized(module.weight))
    return [name for name, _ in found]


@dataclass
class _Fitting:
    """Fits each norm to what the old model's batch norm gives on the same data.

    One pass of each model a batch: at its call a norm gets the line of all data so far and runs with it, so
    those behind it are fitted to what reaches them, and make up for what it could not reproduce. A second
    sweep, in which the first counts little, starts from norms that are nearly right.
    """

    old: nn.Module
    new: nn.Module
    data: Iterable[Any]
    wanted: dict[str, list[Tensor]] = field(default_factory=dict)  # of one batch, in the order of the calls
    sums: dict[str, "_Sums"] = field(default_factory=dict)

    def run(self, norms: dict[str, nn.GroupNorm]) -> dict[str, float]:
        """The share of the variance that each norm explains; the norms are fitted."""
        with preserved(self.old, self.data), preserved(self.new), torch.no_grad():
            set_modes(self.old, training=False)
            set_modes(self.new, training=False)
            with self._watched(norms):
                for _ in range(_SWEEPS):
                    for sums in self.sums.values():
                        sums.fade()
                    for batch in whole_batches(self.data, _FITTING_SAMPLES, placement(self.new)):
                        self.wanted.clear()
                        call(self.old, batch)
                        call(self.new, batch)
            lines = {name: sums.line() for name, sums in self.sums.items()}
        if not lines:
            raise SurgeryError("fit= gave no data that reaches a norm")
        for name, line in lines.items():
            _put_line(norms[name], line)
        return {name: explained for name, (_, _, explained) in lines.items()}

    @contextmanager
    def _watched(self, norms: dict[str, nn.GroupNorm]) -> Iterator[None]:
        hooks = []
        for name, norm in norms.items():
            asked, fitted = partial(self._ask, name), partial(self._fit, name)
            hooks.append(self.old.get_submodule(name).register_forward_pre_hook(asked, with_kwargs=True))
            hooks.append(norm.register_forward_pre_hook(fitted, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _ask(self, name: str, layer: Any, *given: Any) -> None:
        y = nn.functional.batch_norm(
            _input(*given), layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps,
            training=layer.running_mean is None,
        )  # fmt: skip
        self.wanted.setdefault(name, []).append(y)

    def _fit(self, name: str, norm: nn.GroupNorm, *given: Any) -> None:
        x, wanted = _input(*given), self.wanted.get(name)
        if x[0, 0].numel() * (norm.num_channels // norm.num_groups) < 2:
            raise SurgeryError(f"{name or 'the norm'} would normalise single values: use other groups")
        if wanted:
            sums = self.sums.setdefault(name, _Sums(norm.num_channels))
            sums.add(nn.functional.group_norm(x, norm.num_groups, eps=norm.eps), wanted.pop(0))
            _put_line(norm, sums.line())


def _input(args: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> Tensor:
    """What a layer is called with."""
    return (*args, *keywords.values())[0]


@torch.no_grad()
def _put_line(norm: nn.GroupNorm, line: tuple[Tensor, Tensor, float]) -> None:
    norm.weight.copy_(line[0])
    norm.bias.copy_(line[1])


class _Sums:
    """Sums for a line y = γ x̂ + β by least squares, for each channel, in float64."""

    def __init__(self, channels: int) -> None:
        self.n = 0.0
        self.sums = torch.zeros(5, channels, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        x, y = (t.transpose(0, 1).flatten(1).to("cpu", torch.float64) for t in (x, y))  # (C, K)
        self.n += x.shape[1]
        self.sums += torch.stack([t.sum(1) for t in (x, y, x * x, x * y, y * y)])

    def fade(self) -> None:
        """Let what was added count a tenth from now on."""
        self.n, self.sums = self.n / 10, self.sums / 10

    def line(self) -> tuple[Tensor, Tensor, float]:
        """γ (C,), β (C,) and the share of the variance of y that they explain, over all channels."""
        x, y, xx, xy, yy = self.sums / self.n
        spread, covariance = xx - x * x, xy - x * y
        weight = torch.where(spread > 1e-12, covariance / spread.clamp(min=1e-12), 0.0)
        left = (yy - y * y) - weight * covariance
        total = (yy - y * y).sum().item()
        return weight, y - weight * x, 1 - left.sum().item() / total if total > 0 else 1.0
