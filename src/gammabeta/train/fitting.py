"""``fit``: a network, a data set and a recipe, trained, judged, and told about as it goes."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ..accelerate.gradients import quick_layers
from ..accelerate.stem import one_stem
from ..conversion.convert import convert
from ..data import Dataset, Split
from ..errors import UsageError
from ..kernels.cpu.allocator import keep_pages
from ..stats.recalibrate import recalibrate
from .batches import DeviceImages, Scaling, generator_for
from .device import Precision, place_model, resolve_device, resolve_precision
from .evaluate import Evaluation, evaluate
from .loop import Progress, Training
from .network import DigitNetwork, initialize_he, initialize_like_notebook
from .recipe import Recipe
from .redundant_bias import without_cancelled_biases
from .watch import LayerStatistics
from .world import ALONE, World

_INITIALIZE, _RECALIBRATE = 2, 3  # purposes of random streams
_REPORT_SECONDS = 0.25
_RECALIBRATION_BATCH = 512  # images: more would fall out of the cache between one layer and the next


class TrainingInterrupted(Exception):  # noqa: N818 -- a wish granted, not an error
    """A training was asked to stop; ``progress`` says where it stood."""

    def __init__(self, progress: Progress) -> None:
        super().__init__("interrupted")
        self.progress = progress


class Observer(Protocol):
    """Is told how a training goes."""

    def progressed(self, progress: Progress, seconds: float) -> None:
        """Some steps were taken; ``seconds`` of training so far."""

    def evaluated(self, epoch: int, split: str, result: Evaluation, seconds: float) -> None:
        """A split, ``"train"`` or ``"test"``, was judged in ``seconds``."""

    def watched(self, progress: Progress, statistics: dict[str, LayerStatistics]) -> None:
        """The batch-norm layers were measured on a fixed batch of training images."""

    def stop_requested(self) -> bool:
        """Tell whether the training shall end after this step."""


class Keeper(Protocol):
    """Puts a training away as it goes, and brings it back."""

    def begin(self, training: Training) -> float:
        """Restore what was kept, if anything was; return the seconds of training that were spent on it."""

    def visit(self, training: Training, seconds: float, *, now: bool = False) -> None:
        """Keep the training if it is time to, or in any case if ``now``; ``seconds`` of training so far."""

    def judged(self, training: Training, test: Evaluation) -> None:
        """Take note of how the model did after an epoch."""


class Silent:
    """An observer that says nothing and never stops."""

    def progressed(self, progress: Progress, seconds: float) -> None:
        """Say nothing."""

    def evaluated(self, epoch: int, split: str, result: Evaluation, seconds: float) -> None:
        """Say nothing."""

    def watched(self, progress: Progress, statistics: dict[str, LayerStatistics]) -> None:
        """Say nothing."""

    def stop_requested(self) -> bool:
        """Go on."""
        return False


@dataclass(frozen=True)
class Outcome:
    """What a training gave. Times are wall-clock seconds; ``train`` includes the ``first_step``."""

    model: nn.Module
    scaling: Scaling
    precision: Precision
    progress: Progress
    train: Evaluation
    test: Evaluation
    seconds: dict[str, float]


def build_network(recipe: Recipe, dataset: Dataset, seed: int) -> DigitNetwork:
    """Build and initialise the notebook's network for a data set, as the recipe says."""
    _, channels, height, width = dataset.train.images.shape
    network = DigitNetwork(
        channels,
        (height, width),
        len(dataset.classes),
        batch_norm=recipe.batch_norm,
        hidden_bias=recipe.hidden_bias,
        momentum=recipe.batch_norm_momentum,
        eps=recipe.batch_norm_eps,
        first_batch=recipe.running_statistics == "first-batch",
    )
    initialize = initialize_like_notebook if recipe.initialization == "notebook" else initialize_he
    initialize(network, generator_for(seed, _INITIALIZE))
    return network


def hold_out(dataset: Dataset, count: int) -> Dataset:
    """Return the data set with the last ``count`` training images in place of the test images."""
    images, labels = dataset.train.images, dataset.train.labels
    if not 0 < count < len(labels):
        raise UsageError(f"cannot hold out {count} of {len(labels)} training images")
    kept, held = Split(images[:-count], labels[:-count]), Split(images[-count:], labels[-count:])
    return Dataset(dataset.name, kept, held, dataset.classes)


def fit(
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    *,
    device: str = "auto",
    seed: int = 0,
    observer: Observer | None = None,
    keeper: Keeper | None = None,
    watch_points: int = 0,
    world: World = ALONE,
) -> Outcome:
    """Train a network on a data set; its batch normalization is converted to the fused modules first.

    Several processes that train together, each calling this, get synchronized batch normalization instead,
    and take the steps that one process would.

    Args:
        model: Any network from ``(N, C, H, W)`` float32 to logits ``(N, classes)``.
        dataset: uint8 images and labels; held on the device for the length of the training.
        recipe: The settings.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        seed: Of the order and the augmentation of the images.
        observer: Is told how it goes, and may ask it to stop.
        watch_points: How often, over the training, to measure the batch-norm layers for the observer.
        keeper: Puts checkpoints away and brings the last one back; None: the training starts anew. Of several
            processes rank 0 has it, if any; the others begin where it does.
        world: The processes that train together.

    Raises:
        UsageError: There are fewer than two images to train on.
        TrainingInterrupted: The observer asked to stop.
    """
    if len(dataset.train.labels) < 2:
        raise UsageError("there are fewer than two training images: a batch of one has no variance")
    watcher = observer or Silent()
    place = resolve_device(world.device(device))
    precision = resolve_precision(recipe.precision, place)
    clock = time.perf_counter()
    scaling = Scaling.of(dataset.train.images, recipe.pixels)
    images = DeviceImages(dataset.train, scaling, place, shift=recipe.shift, flip=recipe.flip)
    test = DeviceImages(dataset.test, scaling, place)
    model = place_model(convert(model, to="sync" if world.size > 1 else "fused"), place)
    training = Training(model, images, recipe, seed, precision, world)
    spent = dict.fromkeys(("prepare", "train", "first_step", "watch", "recalibrate", "evaluate"), 0.0)
    spent["prepare"] = time.perf_counter() - clock
    if keeper is not None:
        spent["train"] = keeper.begin(training)
    _begin_alike(training)
    drive = _Drive(training, watcher, keeper, watch_points if recipe.batch_norm else 0, spent)

    def judge(epoch: int) -> tuple[Evaluation, Evaluation]:
        results = []
        for split, data in (("train", images), ("test", test)):
            clock = time.perf_counter()
            result = evaluate(model, data, len(dataset.classes), precision=precision, world=world)
            taken = time.perf_counter() - clock
            spent["evaluate"] += taken
            watcher.evaluated(epoch, split, result, taken)
            results.append(result)
        return results[0], results[1]

    results: tuple[Evaluation, Evaluation] | None = None
    with keep_pages(), _uncollected(), quick(model, alone=world.size == 1):
        while results is None or training.step < training.steps:
            epoch = training.epoch
            drive.to_end_of_epoch()
            last = training.step == training.steps
            if last and recipe.recalibrate and recipe.batch_norm:
                spent["recalibrate"] = _recalibrate(model, images, recipe, seed, precision, world)
            if last or recipe.evaluate == "epoch":
                results = judge(epoch)
                if keeper is not None:
                    keeper.judged(training, results[1])
            if keeper is not None and not last:
                keeper.visit(training, spent["train"], now=True)
    return Outcome(model, scaling, precision, training.progress(), *results, spent)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Spare the garbage collector what there is already: it would go through all modules within a step."""
    if gc.get_freeze_count():  # somebody's affair, and done
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def quick(model: nn.Module, *, alone: bool = True) -> Iterator[None]:
    """Spare the model what costs time and changes nothing; ranks that average gradients expect them all."""
    if not alone:
        with quick_layers(model):
            yield
        return
    with without_cancelled_biases(model), one_stem(model), quick_layers(model):
        yield


class _Drive:
    """Takes the steps in stretches short enough to tell how it goes and to stop when asked."""

    def __init__(
        self,
        training: Training,
        watcher: Observer,
        keeper: Keeper | None,
        watch_points: int,
        spent: dict[str, float],
    ) -> None:
        self._training, self._watcher, self._keeper, self._spent = training, watcher, keeper, spent
        self._watch_every = max(1, training.steps // watch_points) if watch_points else 0
        self._stretch = 1

    def to_end_of_epoch(self) -> None:
        training = self._training
        end = min(training.steps, (training.epoch + 1) * training.order.steps_per_epoch)
        while training.step < end:
            self._take(min(end, self._next_watch()))
            stop = self._agreed(self._watcher.stop_requested())
            if self._keeper is not None and (stop or training.step < end):
                self._keeper.visit(training, self._spent["train"], now=stop)
            if stop:
                raise TrainingInterrupted(training.progress())

    def _agreed(self, stop: bool) -> bool:
        """Whether any rank shall stop; all take as many steps next as rank 0 thinks right."""
        everyone = self._training.world.gather((self._stretch, stop))
        self._stretch = everyone[0][0]
        return any(wish for _, wish in everyone)

    def _take(self, limit: int) -> None:
        training, clock = self._training, time.perf_counter()
        training.advance(min(self._stretch, limit - training.step))
        progress = training.progress()
        taken = time.perf_counter() - clock
        self._spent["train"] += taken
        self._spent["first_step"] = self._spent["first_step"] or taken  # the first stretch is one step
        self._stretch = max(
            1, min(2 * self._stretch, int(self._stretch * _REPORT_SECONDS / max(taken, 1e-6)))
        )
        self._watcher.progressed(progress, self._spent["train"])
        if self._watch_every and training.step % self._watch_every == 0:
            clock = time.perf_counter()
            self._watcher.watched(progress, training.watch())
            self._spent["watch"] += time.perf_counter() - clock

    def _next_watch(self) -> int:
        every = self._watch_every
        return (self._training.step // every + 1) * every if every else self._training.steps


def _begin_alike(training: Training) -> None:
    """Bring every rank to where rank 0 stands."""
    world = training.world
    if world.share(training.step):
        state = world.share(training.state() if world.writes else None)
        if not world.writes:
            training.restore(state)


def _recalibrate(
    model: nn.Module, images: DeviceImages, recipe: Recipe, seed: int, precision: Precision, world: World
) -> float:
    clock = time.perf_counter()
    order = torch.randperm(len(images), generator=generator_for(seed, _RECALIBRATE))[: recipe.recalibrate]
    device = images.labels.device

    def forward(network: nn.Module, x: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return network(x)

    mine = order.split(_RECALIBRATION_BATCH)[world.rank :: world.size]
    batches = (images.batch(part.to(device))[0] for part in mine)
    recalibrate(model, batches, forward_fn=forward)
    return time.perf_counter() - clock
