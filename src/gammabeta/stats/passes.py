"""Passes over the data that measure what enters each norm: all at once, or one after another.

See ``recalibrate`` for the two ways and where they come from.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GammabetaWarning, NotFiniteError, SurgeryError, UsageError
from .batches import ForwardFn, placement, whole_batches
from .moments import Moments, Ranks, batch_moments
from .norms import channels, frozen_norms, statistics, with_statistics
from .observe import BY_BATCH, Use, observed
from .preserve import overwrite
from .samples import count

_NO_DATA = "the loader gave no data that reaches a batch-normalization layer"
Statistics = tuple[Tensor, Tensor, int]  # running mean, unbiased running variance, number of batches


class NotCalibrated(GammabetaWarning):
    """Norms that kept the statistics they had: ``kept``, by name the reason."""

    def __init__(self, kept: dict[str, str], done: str = "recalibrated") -> None:
        self.kept = kept
        super().__init__(f"not {done}{listed(kept)}")


def to_measure(model: nn.Module, *, include_frozen: bool = False) -> tuple[dict[str, Any], dict[str, str]]:
    """The norms whose statistics shall be new, and those that a model's ``train()`` holds, with the reasons.

    Raises:
        SurgeryError: there is none.
    """
    layers = with_statistics(model)
    frozen = {} if include_frozen else frozen_norms(model, layers)
    kept = {name: why for name, why in frozen.items() if "train()" in why}
    layers = {name: layer for name, layer in layers.items() if name not in frozen}
    if not layers and frozen:
        reasons = listed(kept or dict([next(iter(frozen.items()))]))
        raise SurgeryError(
            f"all batch normalization is frozen; recalibrate(include_frozen=True) takes it in{reasons}"
        )
    if not layers:
        raise SurgeryError("the model has no batch normalization with running statistics")
    return layers, kept


class _ReachedLayer(BaseException):
    """The layer being measured has got its input: the rest of the forward pass is of no use.

    Not an ``Exception``, so that a model's own error handling does not take it for one.
    """


@dataclass
class Passes:
    """Passes over the data, each pooling the moments of some layers' inputs, over all ranks."""

    model: nn.Module
    loader: Iterable[Any]
    samples: int | None
    forward_fn: ForwardFn
    progress: Callable[[int], object] | None
    ranks: Ranks
    refused: dict[str, str]
    seen: int = 0  # samples of the last pass

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise UsageError(f"samples must be at least 1, not {self.samples}")

    def measure(self, layers: dict[str, Any], *, stop: bool) -> dict[str, Statistics]:
        """New statistics of each layer that the data reaches; ``stop`` ends each forward at its layer."""
        found = {name: Moments.empty(channels(layer)) for name, layer in layers.items()}

        def pool(name: str, layer: Any, x: Tensor) -> Use:
            batch = batch_moments(x).whole
            use = BY_BATCH if batch.count > 1 else _pooled(layer, found[name])
            found[name].pool(batch)
            if stop and not isinstance(layer, torch.jit.ScriptModule):  # C++ would turn it into another error
                raise _ReachedLayer
            return use

        def run() -> None:
            self.seen = 0
            for batch in whole_batches(self.loader, self.samples, placement(self.model)):
                with suppress(_ReachedLayer):
                    self.forward_fn(self.model, batch)
                self.seen += count(batch) or 1
                if self.progress is not None:
                    self.progress(count(batch) or 1)

        failure = self._watch(layers, pool, run)
        merged = self.ranks.merge(found, failure)
        if not any(moments.count for moments in merged.values()):
            raise SurgeryError(_NO_DATA + listed(self.refused))
        return {name: _checked(name, layers[name], m) for name, m in merged.items() if m.batches}

    def measure_in_order(self, layers: dict[str, Any]) -> dict[str, Statistics]:
        """New statistics of each layer, measured after the layers before it have got theirs.

        Raises:
            UsageError: the loader is an iterator, which can be used only once.
        """
        if isinstance(self.loader, Iterator):
            raise UsageError("layers are measured one after the other: give a loader, not an iterator")
        results: dict[str, Statistics] = {}
        for name, calls in self._calls(layers).items():
            results |= self.measure({name: layers[name]}, stop=calls == 1)
            if name in results:
                write(layers[name], *results[name])
        if not results:
            raise SurgeryError(_NO_DATA + listed(self.refused))
        return results

    def _calls(self, layers: dict[str, Any]) -> dict[str, int]:
        """How often the first batch reaches each layer, in the order in which it reaches them."""
        calls: dict[str, int] = {}

        def count(name: str, _layer: Any, _x: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1

        def run() -> None:
            for batch in islice(whole_batches(self.loader, 1, placement(self.model)), 1):
                self.forward_fn(self.model, batch)

        return self.ranks.agree(calls, self._watch(layers, count, run))

    def _watch(self, layers: dict[str, Any], record: Any, run: Callable[[], None]) -> Exception | None:
        """Run under watch; return what failed."""
        try:
            with observed(self.model, layers, record, self.forward_fn) as observer:
                try:
                    run()
                finally:
                    self.refused |= observer.refused
        except Exception as error:
            return error
        return None


def _pooled(layer: Any, moments: Moments) -> Use:
    """Normalise by what has been pooled so far, or by the stored statistics when that is too little."""
    mean, var = statistics(layer) or (moments.mean, moments.variance)
    if moments.count <= 1:
        return Use(mean.reshape(-1), var.reshape(-1))
    return Use(moments.mean.to(mean.device, mean.dtype), moments.variance.to(var.device, var.dtype))


def _checked(name: str, layer: Any, moments: Moments) -> Statistics:
    """The moments as the layer stores them."""
    if moments.count == 1:
        raise SurgeryError(f"{name or 'the layer'} saw one value per channel in all: give it more data")
    old_mean, old_var = statistics(layer) or (moments.mean, moments.variance)
    mean = moments.mean.to(old_mean.device, old_mean.dtype).view_as(old_mean)
    var = moments.unbiased_variance.to(old_var.device, old_var.dtype).view_as(old_var)
    if not (torch.isfinite(mean).all() and torch.isfinite(var).all()):
        raise NotFiniteError(
            f"the input of {name or 'the layer'} is not finite, or its moments overflow {mean.dtype}"
        )
    return mean, var, moments.batches


def finish(
    passes: Passes, layers: dict[str, Any], new: dict[str, Statistics], kept: dict[str, str], done: str
) -> None:
    """Store the statistics, and warn of the layers that keep what they had."""
    for name, measured in new.items():
        write(layers[name], *measured)
    kept = kept | {n: passes.refused.get(n, "the data did not reach it") for n in layers if n not in new}
    if kept:
        warnings.warn(NotCalibrated(kept, done), stacklevel=3)


def write(layer: Any, mean: Tensor, var: Tensor, batches: int) -> None:
    """Store the statistics, in place."""
    for kept, new in zip(statistics(layer) or (), (mean, var), strict=False):
        overwrite(kept, new)
    counter = getattr(layer, "num_batches_tracked", None)
    if isinstance(counter, Tensor):
        overwrite(counter, counter.clamp(min=batches))


def listed(kept: dict[str, str]) -> str:
    """Names with their reasons, those that share one together."""
    by_reason: dict[str, list[str]] = {}
    for name, why in kept.items():
        by_reason.setdefault(why, []).append(name or "the model")
    return "".join(f"; {', '.join(names)}: {why}" for why, names in by_reason.items()).replace(";", ":", 1)
