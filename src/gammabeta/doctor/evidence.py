"""Everything the checks look at, gathered beforehand, so that each check is a pure function of it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..stats.moments import Moments

BINS, REACH = 60, 6.0  # of the histograms: equal bins of [-REACH, REACH]
FEW_UPDATES = 100  # fewer: the weights are near where they were drawn, or nobody knows where


@dataclass(frozen=True)
class Layer:
    """A batch-normalization module as found; tensors are float64 copies on the CPU, of shape (C,).

    ``updates`` is ``num_batches_tracked``, None where the layer has no such buffer. ``var`` is the running
    variance, unbiased by PyTorch's convention. ``frozen``: its owner holds the statistics still.
    ``held``: by a ``train()`` of the owner's own, which leaves the layer in evaluation.
    """

    name: str
    kind: str
    channels: int
    eps: float
    momentum: float | None
    training: bool
    frozen: bool
    frozen_class: bool
    tracks: bool
    synchronized: bool
    mean: Tensor | None
    var: Tensor | None
    buffer_dtype: torch.dtype | None
    updates: int | None
    weight: Tensor | None
    bias: Tensor | None
    parameter_dtype: torch.dtype | None
    affine_learns: bool | None
    held: bool = False

    @property
    def label(self) -> str:
        """A name to print, also for a model that is itself one layer."""
        return self.name or "(the model)"

    @property
    def young(self) -> bool:
        """Whether the layer has hardly been trained, if it counts: what its weights do is then chance."""
        return self.updates is not None and 0 < self.updates < FEW_UPDATES

    @property
    def stored(self) -> bool:
        """Whether the layer keeps statistics, frozen or not."""
        return self.mean is not None and self.var is not None

    @property
    def running(self) -> tuple[Tensor, Tensor]:
        """Running mean and variance of a layer that keeps them."""
        assert self.mean is not None
        assert self.var is not None
        return self.mean, self.var

    @property
    def trivial(self) -> bool:
        """Whether the statistics are exactly those a new layer starts with: mean 0, variance 1."""
        mean, var = self.running
        return bool((mean == 0).all() and (var == 1).all())


@dataclass(frozen=True)
class Surroundings:
    """What stands before and after a layer, from a traced forward pass or from ``nn.Sequential``.

    ``producer`` is the convolution or linear layer whose output is the layer's input, unchanged in between.
    ``calls`` is how often one forward pass in training calls the layer, and ``calls_vary`` that this depends
    on the batch or on chance.
    ``dropout`` is the probability of a dropout between the previous batch normalization and this layer;
    ``dropout_direct`` says that nothing else stands between the two. ``of_data`` says that the layer
    normalises the model's input itself, perhaps in another shape: nothing that learns stands before it.
    """

    producer: str | None = None
    producer_bias: bool = False
    relu_after: bool = False
    dropout: float = 0.0
    dropout_direct: bool = False
    of_data: bool = False
    calls: int | None = None
    calls_vary: bool = False


class BatchSize(NamedTuple):
    """Samples in a batch, and values per channel that a layer gets of it."""

    images: int
    values: int


class Activity:
    """What a layer's input did over the data.

    Attributes:
        population: moments of the input with batch normalization in training and dropout off.
        as_trained: the same with everything in training, dropout included.
        batch_means: moments over batches of the batch mean.
        batch_variances: moments over batches of the (biased) batch variance.
        image_means: in evaluation, moments over images of each image's mean.
        image_means_within: (C,) the part of their ``m2`` that lies within batches.
        eval_batches: batches that ``image_means`` were taken over.
        largest: (C,) the largest (biased) batch variance.
        sizes: how many batches had which size.
        histogram: counts of the first batch's input, standardised by the running statistics and by its own.
    """

    def __init__(self, channels: int) -> None:
        self.population = Moments.empty(channels)
        self.as_trained = Moments.empty(channels)
        self.batch_means = Moments.empty(channels)
        self.batch_variances = Moments.empty(channels)
        self.image_means = Moments.empty(channels)
        self.image_means_within = torch.zeros(channels, dtype=torch.float64)
        self.eval_batches = 0
        self.largest = torch.zeros(channels, dtype=torch.float64)
        self.sizes: Counter[BatchSize] = Counter()
        self.histogram: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Optimizer:
    """``steps`` taken (None where the optimiser does not count), and affine parameters that decay."""

    steps: int | None
    decayed: dict[str, tuple[str, ...]]
    weight_decay: float


@dataclass(frozen=True)
class Gap:
    """The same data in four modes; each value is the mean loss over samples, or None without a loss.

    Attributes:
        train: everything in training.
        bn_train: only batch normalization in training.
        population: evaluation with the data's exact statistics.
        evaluation: evaluation as is.
        stale: ``evaluation - population`` of each batch; their mean and standard error decide.
        noise: ``population - bn_train`` of each batch.
        output_change: ‖f(evaluation) − f(population)‖² over the variance of f(population): the part of the
            output that stale statistics change.
        output_noise: the same between ``bn_train`` and ``population``.
        elsewhere: ``bn_train - train`` of each batch, which the known batch normalization does not explain,
            where training and evaluation gave outputs of the same form; else empty.
        chance: as ``noise``, of batches drawn anew from the data; empty where there is little noise, or the
            samples cannot be told apart.
        by_size: how much of their mean noise is due to the size of these batches; without a loss, of the
            output's noise in them.
    """

    train: float | None
    bn_train: float | None
    population: float | None
    evaluation: float | None
    stale: tuple[float, ...]
    noise: tuple[float, ...]
    output_change: float
    output_noise: float
    elsewhere: tuple[float, ...] = ()
    chance: tuple[float, ...] = ()
    by_size: float = 0.0

    @property
    def losses(self) -> tuple[float, float, float] | None:
        """The losses that batch normalization accounts for: ``bn_train``, ``population``, ``evaluation``."""
        if self.bn_train is None or self.population is None or self.evaluation is None:
            return None
        return self.bn_train, self.population, self.evaluation


@dataclass(frozen=True)
class LoaderShape:
    """What a loader says about itself: samples, batch size, whether the remainder is dropped."""

    samples: int
    batch_size: int
    drop_last: bool

    @property
    def leaves_one(self) -> bool:
        """Whether the last batch is a single sample, after larger ones."""
        several = not self.drop_last and 1 < self.batch_size < self.samples
        return several and self.samples % self.batch_size == 1


@dataclass(frozen=True)
class Ranks:
    """A distributed run: how many processes, and layers whose buffers are not the same on all of them."""

    world_size: int
    diverging: tuple[str, ...]


@dataclass
class Evidence:
    """The model's facts, and what runs of it showed; None where that was not looked at.

    ``unreached``: layers that the example does not reach. ``own_statistics``: modules that are no batch
    normalization known here, and whose buffers or plain tensors a forward pass in training changes.
    """

    layers: list[Layer]
    surroundings: dict[str, Surroundings]
    optimizer: Optimizer | None = None
    source: str | None = None
    model_training: bool = False
    activity: dict[str, Activity] | None = None
    gap: Gap | None = None
    changed_in_eval: tuple[str, ...] | None = None
    repeats_differ: float | None = None
    batch_dependence: float | None = None
    updated_in_backward: tuple[str, ...] | None = None
    unreached: tuple[str, ...] = ()
    own_statistics: tuple[str, ...] = ()
    loader: LoaderShape | None = None
    batch_images: tuple[int, ...] = ()
    ranks: Ranks | None = None
    samples: int = 0
    not_examined: list[str] = field(default_factory=list)

    def stored(self) -> list[Layer]:
        """Layers that keep statistics, frozen or not."""
        return [layer for layer in self.layers if layer.stored]

    def updating(self) -> list[Layer]:
        """Layers that keep statistics of their own and are not held still by their owner."""
        return [layer for layer in self.layers if layer.stored and not layer.frozen]

    def around(self, layer: Layer) -> Surroundings:
        """The layer's surroundings, or none known."""
        return self.surroundings.get(layer.name, Surroundings())

    def seen(self, layer: Layer) -> Activity | None:
        """What the data did in this layer, or None where none reached it."""
        activity = (self.activity or {}).get(layer.name)
        return activity if activity is not None and activity.population.count > 0 else None
