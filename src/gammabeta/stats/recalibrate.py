"""``recalibrate``: replace running statistics by the exact ones of a data set.

Running statistics are an exponential average over batches of *different* weights, each weighted alike
whatever its size. Ioffe and Szegedy (2015, algorithm 2, lines 8-12) meant something else for inference: the
population's mean and variance under the final weights. This module computes those, in one of two ways that
the literature distinguishes:

``"joint"`` (one pass)
    Every layer normalises by its batch, as in training, while the moments of its input are pooled. This is
    Ioffe and Szegedy's algorithm 2 and the "PreciseBN" of Wu and Johnson (2021, "Rethinking 'Batch' in
    BatchNorm", section 3), except that the variance is the population's own, pooled about the common mean,
    and not the average of the batches' variances. The first layer's statistics are the same for any split
    of the data into batches; a deeper layer sees what its predecessors make of each batch, so use batches as
    large as in training, or larger.

``"in-order"`` (one partial pass per layer)
    Each layer is measured with every earlier one already in evaluation on its new statistics, so it sees
    exactly what it will see in use. The result does not depend on the split at any depth. It costs as many
    passes as there are layers, each one stopped when its layer has been reached, and needs a loader that can
    be iterated repeatedly. (A layer that one forward pass calls several times normalises by its batch while
    it is measured itself.)
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import NotFiniteError, SurgeryError, UsageError
from ..graph.layers import unwrap
from .batches import ForwardFn, batches, call, placement, size
from .moments import Moments, Ranks, batch_moments
from .norms import channels, frozen_norms, norms, statistics
from .observe import BY_BATCH, Use, observed
from .preserve import overwrite, preserved, set_modes

Mode = Literal["joint", "in-order"]


class NotCalibrated(UserWarning):
    """Norms that kept the statistics they had, each with the reason."""


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    samples: int | None = None,
    mode: Mode = "joint",
    forward_fn: ForwardFn | None = None,
    include_frozen: bool = False,
    merge_ranks: bool = True,
    progress: Callable[[int], object] | None = None,
) -> nn.Module:
    """Set every layer's running statistics to the exact moments of its input over ``loader``.

    Means and variances are pooled in float64 by Chan's formula, so each *value* weighs the same, whatever the
    sizes of the batches. ``running_var`` gets the unbiased variance (the sum of squares over n − 1), as
    PyTorch stores it. Dropout and everything else but batch normalization is in evaluation. A layer called
    several times per forward pass pools all its inputs, and so does one whose statistics other code uses
    (``F.batch_norm`` on its buffers, a ScriptModule, an exported graph). A class of your own with a mean and
    a variance is measured if a trial shows that it is a batch normalization. Layers without running
    statistics and frozen layers (see below) keep what they have. ``num_batches_tracked`` becomes the number
    of batches pooled where it was less.

    All or nothing: when anything raises (the loader, the model, a non-finite moment) the model is left bit
    for bit as it was. Modes, momentum, hooks and every other buffer are as before in any case.

    Args:
        model: any module with batch normalization in it: PyTorch's classes, ours, their subclasses; changed
            in place. ``torch.compile`` and ``DistributedDataParallel`` wrappers are looked through.
        loader: any iterable of batches: tensors (N, …), ``(input, target)`` tuples, or dicts.
        samples: stop after the batch that completes this number of samples; None: use everything.
        mode: "joint" or "in-order", as described above. In "joint", a batch with one value per channel, by
            which no layer can normalise, is normalised by what has been pooled so far.
        forward_fn: ``forward_fn(model, batch)`` runs the model where its input is not the batch, its first
            element, or keywords.
        include_frozen: also recalibrate frozen layers: of a ``FrozenBatchNorm`` class, in evaluation inside a
            model in training, left in evaluation by the model's own ``train()``, or (in a model in
            evaluation) with no affine parameter that requires a gradient although others in the model do.
        merge_ranks: under ``torch.distributed``, pool the moments of all ranks, so that they end with
            identical statistics; every rank must then call this function, with as many batches as it has,
            even none.
        progress: called after each batch with its number of samples.

    Returns:
        ``model`` itself.

    Warns:
        NotCalibrated: names each layer that the data did not reach, that a model's own ``train()`` holds, or
            whose class is not understood.

    Raises:
        SurgeryError: no layer to recalibrate, no data, a single value per channel, non-finite moments, or a
            failure on another rank. The model is unchanged.
        UsageError: a bad argument, or a one-shot iterator for "in-order".
    """
    if mode not in ("joint", "in-order"):
        raise UsageError(f'mode must be "joint" or "in-order", not {mode!r}')
    if samples is not None and samples < 1:
        raise UsageError(f"samples must be at least 1, not {samples}")
    if mode == "in-order" and isinstance(loader, Iterator):
        raise UsageError(
            "in-order recalibration passes over the data repeatedly: give a loader, not an iterator"
        )
    inner = unwrap(model)
    layers = {name: layer for name, layer in norms(inner).items() if statistics(layer) is not None}
    frozen = {} if include_frozen else frozen_norms(inner, layers)
    kept = {name: why for name, why in frozen.items() if "train()" in why}
    layers = {name: layer for name, layer in layers.items() if name not in frozen}
    if not layers:
        raise SurgeryError(
            "no batch normalization with running statistics to recalibrate, or all of it is frozen"
            f"{_listed(kept)}"
        )
    several = merge_ranks and dist.is_available() and dist.is_initialized()
    ranks = Ranks(dist.get_world_size() if several else 1)
    passes = _Passes(inner, loader, samples, forward_fn or call, progress, ranks, {})
    with preserved(inner, loader), torch.no_grad():
        set_modes(inner, training=False)
        new = passes.measure(layers, stop=False) if mode == "joint" else passes.measure_in_order(layers)
    for name, measured in new.items():
        _write(layers[name], *measured)
    kept |= {n: passes.refused.get(n, "the data did not reach it") for n in layers if n not in new}
    if kept:
        warnings.warn(NotCalibrated(f"kept the statistics they had{_listed(kept)}"), stacklevel=2)
    return model


def _listed(kept: dict[str, str]) -> str:
    """Names with their reasons, those that share one together."""
    by_reason: dict[str, list[str]] = {}
    for name, why in kept.items():
        by_reason.setdefault(why, []).append(name or "the model")
    return "".join(f"; {', '.join(names)}: {why}" for why, names in by_reason.items()).replace(";", ":", 1)


_NO_DATA = "the loader gave no data that reaches a batch-normalization layer"
Statistics = tuple[Tensor, Tensor, int]  # running mean, unbiased running variance, number of batches


class _ReachedLayer(BaseException):
    """The layer being measured has got its input: the rest of the forward pass is of no use.

    Not an ``Exception``, so that a model's own error handling does not take it for one.
    """


@dataclass
class _Passes:
    """Passes over the data, each pooling the moments of some layers' inputs, over all ranks."""

    model: nn.Module
    loader: Iterable[Any]
    samples: int | None
    forward_fn: ForwardFn
    progress: Callable[[int], object] | None
    ranks: Ranks
    refused: dict[str, str]

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
            for batch in batches(self.loader, self.samples, placement(self.model)):
                with suppress(_ReachedLayer):
                    self.forward_fn(self.model, batch)
                if self.progress is not None:
                    self.progress(size(batch))

        failure = self._watch(layers, pool, run)
        merged = self.ranks.merge(found, failure)
        if not any(moments.count for moments in merged.values()):
            raise SurgeryError(_NO_DATA + _listed(self.refused))
        return {name: _checked(name, layers[name], m) for name, m in merged.items() if m.batches}

    def measure_in_order(self, layers: dict[str, Any]) -> dict[str, Statistics]:
        """New statistics of each layer, measured after the layers before it have got theirs."""
        results: dict[str, Statistics] = {}
        for name, calls in self._calls(layers).items():
            results |= self.measure({name: layers[name]}, stop=calls == 1)
            if name in results:
                _write(layers[name], *results[name])
        if not results:
            raise SurgeryError(_NO_DATA + _listed(self.refused))
        return results

    def _calls(self, layers: dict[str, Any]) -> dict[str, int]:
        """How often the first batch reaches each layer, in the order in which it reaches them."""
        calls: dict[str, int] = {}

        def count(name: str, _layer: Any, _x: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1

        def run() -> None:
            for batch in islice(batches(self.loader, 1, placement(self.model)), 1):
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


def _write(layer: Any, mean: Tensor, var: Tensor, batches: int) -> None:
    """Store the statistics, in place."""
    for kept, new in zip(statistics(layer) or (), (mean, var), strict=False):
        overwrite(kept, new)
    counter = getattr(layer, "num_batches_tracked", None)
    if isinstance(counter, Tensor):
        overwrite(counter, counter.clamp(min=batches))
