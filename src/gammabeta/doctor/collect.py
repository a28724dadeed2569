"""Run a model over its data in four modes, five without a loss, and keep nothing but sums.

First pass, for each batch: batch normalization in training with everything else in evaluation (the
population's moments come from here), then everything in training. Second pass, over the same data: evaluation
on those exact statistics, then evaluation as is. The random state is put back between the two passes, so that
a shuffled or augmented loader gives the same batches again. Where batch statistics change the result, a few
batches drawn anew from the data show how much of that is chance.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import UsageError
from ..graph.layers import batch_norm_layers, frozen_layers
from ..stats import batches
from ..stats import samples as samples_of
from ..stats.moments import Moments, batch_moments
from ..stats.observe import observed
from ..stats.preserve import overwrite, preserved, same_bits, set_modes
from .evidence import BINS, REACH, Activity, BatchSize, Evidence, Gap, Surroundings
from .noise import drawn_from
from .resample import Reservoir, of_size
from .static import held_layers, read_layers
from .trace import tensors

LossFn = Callable[[Any, Any], Any]
OTHER_NOISE = 2**31  # added to a batch's seed
MODES = ("train", "bn_train", "population", "evaluation")
NOISY = 0.05  # of the loss, or of the output's variance: half of what a check names


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


@dataclass
class Collector:
    """Runs ``model`` over the batches of ``again()`` in each mode. The caller restores the model."""

    model: nn.Module
    again: Callable[[], Iterable[Any]]
    forward_fn: batches.ForwardFn
    loss: LossFn | None
    samples: int | None
    progress: Callable[[int], object]
    own: tuple[str, ...] = ()  # modules that keep statistics of their own and are no batch norm known here

    def __post_init__(self) -> None:
        self.layers = batch_norm_layers(self.model)
        self.modes = {module: module.training for module in self.model.modules()}
        self.frozen = frozen_layers(self.model) | held_layers(self.model)
        self.buffers = [(tensor, tensor.clone()) for tensor in self.model.buffers()]
        self.activity = {name: Activity(layer.num_features) for name, layer in self.layers.items()}
        self.losses: dict[str, dict[int, float]] = {mode: {} for mode in MODES}  # by mode and batch
        self.change, self.noise = _Distance(), _Distance()
        # All modes draw the same noise, unless the amount drawn depends on the data (rejection sampling): the
        # generator's state after each mode shows it. The floor is what other noise changes then.
        self.drawn: list[bytes] = []
        self.floor = _Distance()
        self.images: list[int] = []
        self.drawn_anew = Reservoir()
        self.chance: list[float] = []  # of batches drawn anew
        self.by_size = 0.0
        self.calls: dict[str, set[int]] = {name: set() for name in self.layers}  # in one pass in training
        self.forms: dict[str, set[tuple[Any, ...]]] = {"train": set(), "evaluation": set()}  # of outputs
        self.training_failed = ""
        self.in_model = False

    def collect(self, evidence: Evidence) -> None:
        """Run both passes, and put what they show into ``evidence``."""
        with torch.no_grad():
            self._first_pass()
            changed = self._second_pass()
            if self._is_noisy() and not self._waits_for_ranks():
                self._draw_anew(evidence)
        if not sum(self.images):
            raise UsageError("the loader gave no data: there is nothing to look at")
        evidence.activity, evidence.gap, evidence.changed_in_eval = self.activity, self._gap(), changed
        evidence.batch_images, evidence.samples = tuple(self.images), sum(self.images)
        for name, counts in self.calls.items():
            around = evidence.surroundings.get(name, Surroundings())
            if len(counts | ({around.calls} - {None})) > 1:
                evidence.surroundings[name] = replace(around, calls_vary=True)
        if self.training_failed:
            evidence.not_examined.append(f"the loss in training: {self.training_failed}")

    def _first_pass(self) -> None:
        for index, batch in enumerate(self._batches()):
            size = samples_of.count(batch)
            self.images.append(size)
            self.drawn_anew.offer(batch, size)
            with suppress_single_sample(size == 1):
                record = partial(self._record_population, size, index == 0)
                with self._kept(), observed(self.model, self.layers, record, self.forward_fn):
                    self._batch_mode()
                    self._forward(batch, index, "bn_train")
                with self._kept():
                    self._train(batch, index)
            self._restore_buffers()
            self.progress(size)

    def _train(self, batch: Any, index: int) -> None:
        """Everything in training. This only informs, so a forward that wants more in training is let be."""
        if self.training_failed:
            return
        self._training_mode()
        counted = Counter[str]()
        try:
            with observed(
                self.model, self.layers, partial(self._record_as_trained, counted), self.forward_fn
            ):
                self._forward(batch, index, "train")
        except Exception as error:
            if "more than 1 value per channel" in str(error):
                raise
            self.in_model, self.losses["train"] = False, {}
            self.training_failed = first_line(error)
        for name, counts in self.calls.items():
            counts.add(counted[name])

    def _second_pass(self) -> tuple[str, ...]:
        """Return the names of the buffers that evaluation changed."""
        changed: tuple[str, ...] = ()
        for index, batch in enumerate(self._batches()):
            size = samples_of.count(batch)
            self.drawn.clear()
            self._evaluation_mode()
            self._use_population()
            exact = self._forward(batch, index, "population")
            if self.loss is None:
                self._batch_mode()
                with self._kept(), suppress_single_sample(size == 1):
                    self.noise.add(self._forward(batch, index, "bn_train"), exact)
            self._restore_buffers()
            self._evaluation_mode()
            before = [(name, b, b.clone()) for name, b in self.model.named_buffers()] if index == 0 else []
            with observed(self.model, self.layers, partial(self._record_evaluation, set()), self.forward_fn):
                output = self._forward(batch, index, "evaluation")
            changed += tuple(name for name, buffer, copy in before if not same_bits(buffer, copy))
            self._restore_buffers()
            self.change.add(output, exact)
            if self.loss is None and len(set(self.drawn)) > 1:
                with drawn_from(OTHER_NOISE + index, self.model):
                    self.floor.add(self.forward_fn(self.model, batch), output)
                self._restore_buffers()
            self.progress(size)
        return changed

    def _gap(self) -> Gap:
        train, bn_train, population, evaluation = self.losses.values()
        return Gap(
            self._mean(train),
            self._mean(bn_train),
            self._mean(population),
            self._mean(evaluation),
            tuple(evaluation[index] - population[index] for index in evaluation),
            tuple(population[index] - bn_train[index] for index in population if index in bn_train),
            max(self.change.relative - self.floor.relative, 0.0),
            max(self.noise.relative - self.floor.relative, 0.0),
            self._elsewhere(),
            tuple(self.chance),
            self.by_size,
        )

    def _is_noisy(self) -> bool:
        """Whether batch statistics give another result than those of all the data."""
        if self.loss is None:
            return self.noise.relative > NOISY
        exact, batch = self._mean(self.losses["population"]), self._mean(self.losses["bn_train"])
        return exact is not None and batch is not None and exact - batch > NOISY * abs(batch)

    def _waits_for_ranks(self) -> bool:
        """Whether further passes would wait for other ranks, whose data may not ask for them."""
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return several and any(layer.synchronized for layer in read_layers(self.model))

    def _draw_anew(self, evidence: Evidence) -> None:
        """The same comparison over batches drawn at random from all the data."""
        try:
            noise = [self._noise_of(index, batch) for index, batch in enumerate(self.drawn_anew.batches())]
        except Exception as error:  # the model's own code, on batches that its loader did not make
            self._restore_buffers()
            evidence.not_examined.append(f"batches drawn anew: {first_line(error)}")
            return
        if noise:
            *self.chance, together = noise
            # A layer that is called once has other statistics in a random batch by chance alone. Not so the
            # calls of another, which may differ, or what modules unknown here keep, which may be stale.
            mean, known = fmean(self.chance), not self.own
            known &= all(max(counts, default=0) < 2 for counts in self.calls.values())
            self.by_size = max(mean, 0.0) if known else of_size(mean, together, len(self.chance))

    def _noise_of(self, index: int, batch: Any) -> float:
        """By how much the statistics of all the data make a batch's loss larger, or change its output."""
        exact, by_batch = (self._once(batch, index, population=which) for which in (True, False))
        if self.loss is None:
            distance = _Distance()
            distance.add(by_batch, exact)
            return max(distance.relative - self.floor.relative, 0.0)
        there = batches.target(batch)
        return float(self.loss(exact, there)) - float(self.loss(by_batch, there))

    def _once(self, batch: Any, index: int, *, population: bool) -> Any:
        """The output by the statistics of all the data, or by the batch's."""
        if population:
            self._evaluation_mode()
            self._use_population()
        else:
            self._batch_mode()
        with self._kept(), drawn_from(index, self.model):
            output = self.forward_fn(self.model, batch)
        self._restore_buffers()
        return output

    def _elsewhere(self) -> tuple[float, ...]:
        """What else makes training better, if outputs have one form in both modes."""
        if self.forms["train"] != self.forms["evaluation"]:
            return ()
        train, bn_train = self.losses["train"], self.losses["bn_train"]
        return tuple(bn_train[index] - train[index] for index in bn_train if index in train)

    def _mean(self, losses: dict[int, float]) -> float | None:
        """The mean over samples of batches' mean losses."""
        total, samples = 0.0, 0
        for index, loss in losses.items():
            total += loss * self.images[index]
            samples += self.images[index]
        return total / samples if samples else None

    def _batches(self) -> Iterator[Any]:
        return batches.whole_batches(self.again(), self.samples, batches.placement(self.model))

    def _forward(self, batch: Any, index: int, mode: str) -> Any:
        self.in_model = True
        with drawn_from(index, self.model):  # the same noise in each mode
            output = self.forward_fn(self.model, batch)
            self.drawn.append(torch.get_rng_state().numpy().tobytes())
        self.in_model = False
        if mode in self.forms:
            self.forms[mode].add(tuple((type(output), t.dim(), *t.shape[1:]) for t in tensors(output)))
        if self.loss is not None:
            self.losses[mode][index] = float(self.loss(output, batches.target(batch)))
        return output

    def _batch_mode(self) -> None:
        """Batch norm, and what keeps such statistics, in training; all else in evaluation."""
        set_modes(self.model, training=False)
        for name, layer in self.layers.items():
            layer.training = name not in self.frozen
        for name in self.own:
            self.model.get_submodule(name).training = True

    def _training_mode(self) -> None:
        """As the owner trains: the modes it came with, or ``train()`` with the frozen layers held still."""
        if self.modes[self.model]:
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
            mean, var = layer.running_mean, layer.running_var
            if name not in self.frozen and mean is not None and var is not None and moments.count > 1:
                overwrite(mean, moments.mean)
                overwrite(var, moments.unbiased_variance)

    def _kept(self) -> AbstractContextManager[None]:
        """Put back what modules with statistics of their own may keep outside buffers."""
        return preserved(self.model) if self.own else nullcontext()

    def _restore_buffers(self) -> None:
        for tensor, copy in self.buffers:
            overwrite(tensor, copy)

    def _record_population(self, images: int, first: bool, name: str, layer: Any, x: Tensor) -> None:
        activity, batch = self.activity[name], batch_moments(x).whole
        if batch.count == 0:
            return
        activity.sizes[BatchSize(images, batch.count)] += 1
        activity.population.pool(batch)
        activity.batch_means.pool(Moments.of_rows(batch.mean[None]))
        activity.batch_variances.pool(Moments.of_rows(batch.variance[None]))
        activity.largest = torch.maximum(activity.largest, batch.variance)
        if first and activity.histogram is None:
            activity.histogram = _histograms(x, batch, layer)

    def _record_as_trained(self, counted: Counter[str], name: str, _layer: Any, x: Tensor) -> None:
        counted.update([name])
        self.activity[name].as_trained.pool(batch_moments(x).whole)

    def _record_evaluation(self, reached: set[str], name: str, _layer: Any, x: Tensor) -> None:
        if name in reached:  # a later call of a reused layer has another distribution
            return
        reached.add(name)
        activity, means = self.activity[name], Moments.of_rows(batch_moments(x).image_means)
        activity.image_means.pool(means)
        activity.image_means_within = activity.image_means_within + means.m2
        activity.eval_batches += 1


def first_line(error: Exception) -> str:
    """An error in one line, as it stands in a report."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


@contextmanager
def suppress_single_sample(expected: bool = True) -> Iterator[None]:
    """A batch of a single sample may leave one value per channel, which PyTorch refuses in training."""
    try:
        yield
    except ValueError as error:
        if not expected or "more than 1 value per channel" not in str(error):
            raise


def _histograms(x: Tensor, batch: Moments, layer: Any) -> tuple[Tensor, Tensor]:
    """Counts of the input standardised by the running statistics, and by the batch's own."""
    x = x[:32].double().cpu()
    view = (1, -1, *[1] * (x.dim() - 2))

    def counts(mean: Tensor, var: Tensor) -> Tensor:
        scale = (var.double().cpu() + layer.eps).clamp(min=1e-30).rsqrt()
        values = (x - mean.double().cpu().view(view)) * scale.view(view)
        values = values.nan_to_num(nan=-REACH, posinf=REACH, neginf=-REACH).clamp(-REACH, REACH)
        return torch.histc(values, BINS, -REACH, REACH)

    own = counts(batch.mean, batch.variance)
    if layer.running_mean is None or layer.running_var is None:
        return own, own
    return counts(layer.running_mean, layer.running_var), own
