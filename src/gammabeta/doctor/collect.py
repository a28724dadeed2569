"""The passes over the data: every batch four times, five without a loss, and nothing kept but sums.

First pass, for each batch: batch normalization in training with everything else in evaluation (the
population's moments come from here), then everything in training. Second pass, over the same data: evaluation
on those exact statistics, then evaluation as is. The random state is wound back between them, so that a
shuffled or augmented loader gives the same batches again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.layers import batch_norm_layers, frozen_layers
from ..stats import batches
from ..stats.moments import Moments, batch_moments
from ..stats.preserve import same_bits, set_modes
from .evidence import Activity, BatchSize, Gap
from .trace import tensors

LossFn = Callable[[Any, Any], Any]
MakeHook = Callable[[Activity, nn.Module], Callable[[Tensor], None]]
BINS, REACH = 60, 6.0


@dataclass
class Outcome:
    """What the passes found."""

    activity: dict[str, Activity]
    gap: Gap
    changed_in_eval: tuple[str, ...]
    images: list[int]
    samples: int


@dataclass
class _Mean:
    """A mean over samples, from batches of any size; NaN-free as long as its parts are."""

    total: float = 0.0
    weight: int = 0

    def add(self, value: float, samples: int) -> None:
        self.total += value * samples
        self.weight += samples

    @property
    def value(self) -> float | None:
        return self.total / self.weight if self.weight else None


@dataclass
class _Losses:
    """Mean losses per mode, and the differences batch by batch."""

    train: _Mean = field(default_factory=_Mean)
    bn_train: _Mean = field(default_factory=_Mean)
    population: _Mean = field(default_factory=_Mean)
    evaluation: _Mean = field(default_factory=_Mean)
    by_batch: list[float | None] = field(default_factory=list)
    stale: list[float] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)


@dataclass
class _Distance:
    """‖a − b‖² beside the variance of b, summed over batches."""

    squared: float = 0.0
    spread: float = 0.0

    def add(self, a: Any, b: Any) -> None:
        for one, other in zip(tensors(a), tensors(b), strict=False):
            if one.shape == other.shape and one.numel():
                one, other = one.double(), other.double()
                self.squared += float((one - other).square().sum())
                self.spread += float((other - other.mean(0)).square().sum())

    @property
    def relative(self) -> float:
        if self.spread == 0.0:
            return 0.0 if self.squared == 0.0 else math.inf
        return self.squared / self.spread


class Passes:
    """Runs ``model`` over ``loader`` in each mode. The caller preserves and restores the model."""

    def __init__(
        self,
        model: nn.Module,
        again: Callable[[], Iterable[Any]],
        forward_fn: batches.ForwardFn,
        loss: LossFn | None,
        samples: int | None,
        progress: Callable[[int], object] | None,
    ) -> None:
        self.model, self.again, self.forward_fn, self.loss = model, again, forward_fn, loss
        self.samples, self.progress = samples, progress
        self.layers = batch_norm_layers(model)
        self.modes = {module: module.training for module in model.modules()}
        self.started_in_training = model.training
        self.frozen = frozen_layers(model)
        self.buffers = [(tensor, tensor.clone()) for tensor in model.buffers()]
        self.activity = {name: _no_activity(layer.num_features) for name, layer in self.layers.items()}
        self.losses, self.change, self.noise = _Losses(), _Distance(), _Distance()
        self.images: list[int] = []
        self.in_model = False

    def run(self) -> Outcome:
        """Both passes."""
        with torch.no_grad():
            self._first_pass()
            changed = self._second_pass()
        losses = self.losses
        gap = Gap(
            losses.train.value,
            losses.bn_train.value,
            losses.population.value,
            losses.evaluation.value,
            tuple(losses.stale),
            tuple(losses.noise),
            self.change.relative,
            self.noise.relative,
        )
        return Outcome(self.activity, gap, changed, self.images, sum(self.images))

    def _first_pass(self) -> None:
        for index, batch in enumerate(self._batches()):
            size = batches.size(batch)
            self.images.append(size)
            self.losses.by_batch.append(None)
            with _forgiving(single=size == 1):
                with self._observe(_population_hook(size, first=index == 0)):
                    self._batch_mode()
                    self.losses.by_batch[-1] = self._forward(batch, self.losses.bn_train)[1]
                with self._observe(_as_trained_hook):
                    self._training_mode()
                    self._forward(batch, self.losses.train)
            self._restore_buffers()
            self._tick(size)

    def _second_pass(self) -> tuple[str, ...]:
        changed: tuple[str, ...] = ()
        for index, batch in enumerate(self._batches()):
            size = batches.size(batch)
            self._evaluation_mode()
            self._use_population()
            exact, population = self._forward(batch, self.losses.population)
            if self.loss is None:
                self._batch_mode()
                with _forgiving(single=size == 1):
                    self.noise.add(self._forward(batch, None)[0], exact)
            self._restore_buffers()
            self._evaluation_mode()
            before = _snapshot(self.model) if index == 0 else {}
            with self._observe(_evaluation_hook):
                output, evaluation = self._forward(batch, self.losses.evaluation)
            if index == 0:
                changed = tuple(name for name, (now, then) in before.items() if not same_bits(now, then))
            self._restore_buffers()
            self.change.add(output, exact)
            if self.loss is not None:
                self.losses.stale.append(evaluation - population)
                by_batch = self.losses.by_batch[index]
                if by_batch is not None:
                    self.losses.noise.append(population - by_batch)
            self._tick(size)
        return changed

    def _batches(self) -> Iterator[Any]:
        return batches.batches(self.again(), self.samples, batches.placement(self.model))

    def _forward(self, batch: Any, mean: _Mean | None) -> tuple[Any, float]:
        self.in_model = True
        output = self.forward_fn(self.model, batch)
        self.in_model = False
        if self.loss is None or mean is None:
            return output, math.nan
        value = float(self.loss(output, batches.target(batch)))
        mean.add(value, batches.size(batch))
        return output, value

    def _tick(self, size: int) -> None:
        if self.progress is not None:
            self.progress(size)

    def _batch_mode(self) -> None:
        """Batch normalization in training; everything else, and frozen layers, in evaluation."""
        set_modes(self.model, training=False)
        for name, layer in self.layers.items():
            layer.training = name not in self.frozen

    def _training_mode(self) -> None:
        """As the owner trains: the modes it came with, or ``train()`` with the frozen layers held still."""
        if self.started_in_training:
            for module, training in self.modes.items():
                module.training = training
        else:
            self.model.train()
            for name in self.frozen:
                self.layers[name].training = False

    def _evaluation_mode(self) -> None:
        """As the owner evaluates: by ``eval()`` itself, which a model may have overridden."""
        for module, training in self.modes.items():
            module.training = training
        self.model.eval()

    def _use_population(self) -> None:
        for name, layer in self.layers.items():
            moments = self.activity[name].population
            held = name in self.frozen or layer.running_mean is None or layer.running_var is None
            if not held and moments.count > 1:
                write(layer.running_mean, moments.mean)
                write(layer.running_var, moments.unbiased_variance)

    def _restore_buffers(self) -> None:
        for tensor, copy in self.buffers:
            if not same_bits(tensor, copy):
                write(tensor, copy)

    @contextmanager
    def _observe(self, make: Callable[[Activity, nn.Module], Callable[[Tensor], None]]) -> Iterator[None]:
        handles = []
        for name, layer in self.layers.items():
            look = make(self.activity[name], layer)

            def hook(
                _module: nn.Module,
                inputs: tuple[Any, ...],
                keywords: dict[str, Any],
                look: Callable[[Tensor], None] = look,
            ) -> None:
                look(inputs[0] if inputs else next(iter(keywords.values())))

            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _forgiving(*, single: bool) -> Iterator[None]:
    """A batch of a single sample may leave one value per channel, which PyTorch refuses in training."""
    try:
        yield
    except ValueError as error:
        if not (single and "more than 1 value per channel" in str(error)):
            raise


def write(tensor: Tensor | None, values: Tensor) -> None:
    """Overwrite ``tensor`` in place, whatever its device, dtype and inference mode."""
    if tensor is not None:
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(values)


def _snapshot(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Every buffer beside a copy of it."""
    return {name: (tensor, tensor.clone()) for name, tensor in model.named_buffers()}


def _no_activity(channels: int) -> Activity:
    def none() -> Moments:
        return Moments.empty(channels)

    return Activity(
        population=none(),
        as_trained=none(),
        batch_means=none(),
        batch_variances=none(),
        image_means=none(),
        image_means_within=torch.zeros(channels, dtype=torch.float64),
        dead=torch.ones(channels, dtype=torch.bool),
    )


def _population_hook(images: int, *, first: bool) -> MakeHook:
    def make(activity: Activity, layer: Any) -> Callable[[Tensor], None]:
        def look(x: Tensor) -> None:
            batch = batch_moments(x).whole
            if batch.count == 0:
                return
            activity.sizes[BatchSize(images, batch.count)] += 1
            activity.population.pool(batch)
            activity.batch_means.pool(Moments.of_rows(batch.mean[None]))
            activity.batch_variances.pool(Moments.of_rows(batch.variance[None]))
            activity.dead &= batch.variance < layer.eps
            if first and activity.histogram is None:
                activity.histogram = _histograms(x, batch, layer)

        return look

    return make


def _as_trained_hook(activity: Activity, _layer: nn.Module) -> Callable[[Tensor], None]:
    return lambda x: activity.as_trained.pool(batch_moments(x).whole)


def _evaluation_hook(activity: Activity, _layer: nn.Module) -> Callable[[Tensor], None]:
    first = True

    def look(x: Tensor) -> None:
        nonlocal first
        if not first:  # a later call of a reused layer has another distribution
            return
        first = False
        means = Moments.of_rows(batch_moments(x).image_means)
        activity.image_means.pool(means)
        activity.image_means_within = activity.image_means_within + means.m2
        activity.eval_batches += 1

    return look


def _histograms(x: Tensor, batch: Moments, layer: Any) -> tuple[Tensor, Tensor]:
    """Counts of the input standardised by the running statistics, and by the batch's own."""
    if x.shape[0] > 32:
        x = x[:32]
    own = _standardised(x, batch.mean, batch.variance, layer.eps)
    if layer.running_mean is None or layer.running_var is None:
        return own, own
    return _standardised(x, layer.running_mean, layer.running_var, layer.eps), own


def _standardised(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    view = (1, -1, *[1] * (x.dim() - 2))
    scale = (var.double() + eps).clamp(min=1e-30).rsqrt()
    values = (x.double().cpu() - mean.double().cpu().view(view)) * scale.cpu().view(view)
    values = values.nan_to_num(nan=-REACH, posinf=REACH, neginf=-REACH).clamp(-REACH, REACH)
    return torch.histc(values, BINS, -REACH, REACH)
