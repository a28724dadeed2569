"""``fit``: train a network on a data set as a recipe says, evaluate it, and report the progress."""

import gc
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..accelerate.gradients import quick_layers
from ..accelerate.stem import one_stem
from ..arguments import check_type
from ..conversion.convert import convert
from ..data import Dataset, load
from ..errors import DivergedError, NotFiniteError, UsageError, WeightsError
from ..files import check_values
from ..graph.trace import convolutions_before_batch_norm
from ..guard import Noticed, watch
from ..kernels.cpu.allocator import keep_pages
from ..stats.recalibrate import recalibrate
from .batches import DeviceImages, Scaling, generator_for
from .calibrate import temperature
from .checkpoint import Checkpointer
from .evaluate import Evaluation, LayerStatistics, evaluate, evaluation_batch
from .loop import Progress, Training, learning_rate
from .recipe import Recipe, load_recipe
from .rehearsal import compile_kernels
from .world import ALONE, Precision, World, place_model, resolve_device, resolve_precision

_RECALIBRATE = 3  # a purpose of random streams
_REPORT_SECONDS = 0.25
SEEN = 32  # images that are kept to be shown
_RECALIBRATION_BATCH = 512  # images: more would fall out of the cache between one layer and the next


class TrainingInterrupted(Exception):  # noqa: N818 -- the user asked for it
    """A training was asked to stop; ``progress`` says where it was."""

    def __init__(self, progress: Progress) -> None:
        super().__init__("interrupted")
        self.progress = progress


class Observer:
    """Is called as a training goes on. This one does nothing and never stops; a subclass does some of it."""

    guards = False  # whether `gammabeta.watch` shall look at the batch norms, and `noticed` be called

    def progressed(self, progress: Progress, seconds: float) -> None:
        """Some steps were taken; ``seconds`` of training so far."""

    def evaluated(self, epoch: int, split: str, result: Evaluation, seconds: float) -> None:
        """A split, ``"train"``, ``"validation"`` or ``"test"``, was judged in ``seconds``."""

    def watched(self, progress: Progress, statistics: dict[str, LayerStatistics]) -> None:
        """The batch-norm layers were measured on a fixed batch of training images."""

    def noticed(self, noticed: Noticed) -> None:
        """The guard found a fault of a batch norm, which it tells once."""

    def compiling(self, done: int, kernels: int) -> None:
        """Before the first step: of the kernels that this machine does not have yet, some are compiled."""

    def tell(self, message: str) -> None:
        """There is something to know about how the training begins."""

    def stop_requested(self) -> bool:
        """Return whether the training shall end after this step."""
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
    validation: Evaluation | None = None  # of the split that chose the best epoch, if there is one
    seen: np.ndarray | None = None  # uint8 (N, C, H, W): images of the first step, as the network saw them
    temperature: float = 1.0  # by which a prediction divides the logits, see `calibrate`


def fit(
    model: nn.Module,
    dataset: Dataset | str | Path,
    recipe: Recipe | str | Path = "fast",
    *,
    device: str = "auto",
    seed: int = 0,
    observer: Observer | None = None,
    checkpointer: Checkpointer | None = None,
    watch_points: int = 0,
    world: World = ALONE,
) -> Outcome:
    """Train a network on a data set; its batch normalization is converted to the fused modules first.

    Several processes that train together each call this. They get synchronized batch normalization instead,
    and take the steps that one process would take.

    Args:
        model: Any network from ``(N, C, H, W)`` float32 to logits ``(N, classes)``.
        dataset: uint8 images and labels, held on the device during the training; or its name or path.
        recipe: The settings; or the name of a recipe, or the path of a TOML file.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        seed: Of the order and the augmentation of the images.
        observer: Is called as the training goes on, and may ask it to stop.
        checkpointer: Writes checkpoints and restores the last one; None: the training starts anew. Of several
            processes only rank 0 may have one; the others start where rank 0 starts.
        watch_points: How often, over the training, the observer gets the batch-norm layers' statistics.
        world: The processes that train together.

    Raises:
        UsageError: An argument is of another type, or there are fewer than two images to train on.
        TrainingInterrupted: The observer asked to stop.
        DivergedError: The loss or the weights are no longer finite numbers.
    """
    check_type("fit", "model", model, nn.Module, "a torch.nn.Module")
    if isinstance(dataset, str | Path):
        dataset = load(dataset)
    check_type("fit", "dataset", dataset, Dataset, "a gammabeta.data.Dataset, or the name or path of one")
    if isinstance(recipe, str | Path):
        recipe = load_recipe(recipe)
    check_type("fit", "recipe", recipe, Recipe, "a gammabeta.train.Recipe, a recipe's name or a TOML file")
    if len(dataset.train.labels) < 2:
        raise UsageError("there are fewer than two training images: a batch of one has no variance")
    place = resolve_device(world.device(device))
    precision = resolve_precision(recipe.precision, place)
    clock = time.perf_counter()
    scaling = Scaling.of(dataset.train.images, recipe.pixels)
    images = DeviceImages.to_train_on(dataset.train, scaling, place, recipe)
    chosen_by = "test" if dataset.validation is None else "validation"  # epochs are judged, and one is best
    judged = DeviceImages(dataset.split(chosen_by), scaling, place)
    model = place_model(convert(model, to="sync" if world.size > 1 else "fused"), place)
    training = Training(model, images, recipe, seed, precision, world)
    work = _Fitting(training, observer or Observer(), checkpointer, watch_points if recipe.batch_norm else 0)
    work.seconds["prepare"] = time.perf_counter() - clock
    work.begin()
    results: tuple[Evaluation, Evaluation] | None = None
    with (
        keep_pages(),
        _uncollected(),
        work.guarded(),
        quick(model, alone=world.size == 1),
        warnings.catch_warnings(),
    ):
        # A batch norm warns of a batch that is not finite; the training ends for it, and says more.
        warnings.filterwarnings("ignore", "a batch with non-finite statistics", RuntimeWarning)
        work.compile_kernels(judged)
        last = False
        while results is None or not last:
            epoch = training.epoch
            work.train_epoch()
            last = training.step == training.steps
            if last:
                work.complete()
            if last or recipe.evaluate == "epoch" or recipe.patience:
                classes = len(dataset.classes)
                results = (
                    work.evaluate(epoch, "train", images.some(recipe.evaluate_train), classes),
                    work.evaluate(epoch, chosen_by, judged, classes),
                )
                if checkpointer is not None:
                    checkpointer.keep_if_best(training, results[1])
                if not last and training.tired(results[1].loss):
                    training.steps = training.step  # and once more: with the mean weights, recalibrated
                    continue
            training.judged = True
            if checkpointer is not None and not last:
                checkpointer.save(training, work.seconds["train"])
    trained, chosen = results
    calibrated = work.calibrate(judged)
    seen = scaling.pixels(training.first_images()[:SEEN])
    if dataset.validation is None:
        outcome = Outcome(model, scaling, precision, training.progress(), trained, chosen, work.seconds)
        return replace(outcome, seen=seen, temperature=calibrated)
    # The test images decide nothing: they are looked at once, when all is decided.
    test = work.evaluate(epoch, "test", DeviceImages(dataset.test, scaling, place), len(dataset.classes))
    outcome = Outcome(model, scaling, precision, training.progress(), trained, test, work.seconds, chosen)
    return replace(outcome, seen=seen, temperature=calibrated)


class _Fitting:
    """The parts of one call of ``fit``, and the seconds that each has taken.

    Steps are taken in runs that are short enough to report the progress and to stop when asked.
    """

    def __init__(
        self, training: Training, observer: Observer, checkpointer: Checkpointer | None, watch_points: int
    ) -> None:
        self._training, self._observer, self._checkpointer = training, observer, checkpointer
        self._watch_every = max(1, training.steps // watch_points) if watch_points else 0
        self._stretch = 1  # steps until the next report
        self._own: Tensor | None = None  # probabilities of the split judged last
        parts = ("prepare", "compile", "train", "first_step", "watch", "recalibrate", "evaluate")
        self.seconds = dict.fromkeys(parts, 0.0)

    def begin(self) -> None:
        """Restore the checkpoint, if there is one, and bring every rank to where rank 0 is."""
        training, world = self._training, self._training.world
        if self._checkpointer is not None:
            self.seconds["train"] = self._checkpointer.restore(training)
            self._checkpointer.keep_if_good(training)
        if world.broadcast(training.step):
            state = world.broadcast(training.state() if world.writes else None)
            if not world.writes:
                training.restore(state)

    def compile_kernels(self, judged: DeviceImages) -> None:
        """Compile what the training will need, so that its speed is that of its steps."""
        self.seconds["compile"] = compile_kernels(self._training, judged, self._observer.compiling)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Watch the batch norms, if the observer wants to know; of several processes only the first does."""
        training = self._training
        if not self._observer.guards or not training.world.writes:
            yield
            return
        with watch(training.model, tell=self._observer.noticed) as guard:
            training.after_step = guard.step
            yield

    def train_epoch(self) -> None:
        """Take the steps to the end of the epoch, unless the observer of some rank asks to stop."""
        training, every = self._training, self._watch_every
        end = min(training.steps, (training.epoch + 1) * training.order.steps_per_epoch)
        while training.step < end:
            next_watch = (training.step // every + 1) * every if every else training.steps
            self._advance(min(end, next_watch))
            # All ranks take as many steps next as rank 0 has chosen, and stop if one of them is asked to.
            everyone = training.world.all_gather((self._stretch, self._observer.stop_requested()))
            self._stretch, stop = everyone[0][0], any(wish for _, wish in everyone)
            if self._checkpointer is not None and (stop or training.step < end):
                self._checkpointer.save(training, self.seconds["train"], now=stop)
            if stop:
                raise TrainingInterrupted(training.progress())

    def _advance(self, limit: int) -> None:
        """Take some steps, up to step ``limit``, and report them."""
        training, clock = self._training, time.perf_counter()
        training.advance(min(self._stretch, limit - training.step))
        progress = training.progress()
        if training.diverged is not None:
            raise self._diverged("loss", training.diverged)
        taken = time.perf_counter() - clock
        self.seconds["train"] += taken
        self.seconds["first_step"] = self.seconds["first_step"] or taken  # the first report is of one step
        wanted = int(self._stretch * _REPORT_SECONDS / max(taken, 1e-6))
        self._stretch = max(1, min(2 * self._stretch, wanted, training.steps))
        self._observer.progressed(progress, self.seconds["train"])
        if self._checkpointer is not None:
            self._checkpointer.keep_if_good(training)
        if self._watch_every and training.step % self._watch_every == 0:
            clock = time.perf_counter()
            self._observer.watched(progress, training.layer_statistics())
            self.seconds["watch"] += time.perf_counter() - clock

    def _diverged(self, what: str, step: int) -> DivergedError:
        """The error for a loss, or weights, that are not finite at a step (from 0)."""
        training = self._training
        rate = learning_rate(training.recipe, step, training.steps)
        epoch = step // training.order.steps_per_epoch
        return DivergedError(
            f"the training diverged: the {what} of step {step + 1:,} (epoch {epoch}) is not finite, at a "
            f"learning rate of {rate:.3g}; try a lower --learning-rate",
            step,
        )

    def complete(self) -> None:
        """After the last step: keep where the optimizer is, and recalibrate if the recipe says so."""
        training = self._training
        try:
            check_values(dict(training.model.named_parameters()), "the model")
        except WeightsError:
            raise self._diverged("result", training.step - 1) from None
        if self._checkpointer is not None:
            self._checkpointer.save(training, self.seconds["train"], now=True)
        training.average.give()
        if training.recipe.recalibrate and training.recipe.batch_norm:
            try:
                self._recalibrate()
            except NotFiniteError:
                raise self._diverged("output", training.step - 1) from None

    def _recalibrate(self) -> None:
        """Give the running statistics their exact values over the recipe's number of training images."""
        training, clock = self._training, time.perf_counter()
        images, world, device = training.data, training.world, training.data.labels.device

        def forward(network: nn.Module, x: Any) -> Any:
            with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16"):
                return network(x)

        order = torch.randperm(len(images), generator=generator_for(training.seed, _RECALIBRATE))
        height, width = images.size  # fewer of large ones: what a layer gives should stay in the cache
        batch = max(2, min(_RECALIBRATION_BATCH, _RECALIBRATION_BATCH * 1024 // (height * width)))
        mine = order[: training.recipe.recalibrate].split(batch)[world.rank :: world.size]
        batches = (images.batch(part.to(device))[0] for part in mine)
        recalibrate(training.model, batches, forward_fn=forward)
        self.seconds["recalibrate"] = time.perf_counter() - clock

    def calibrate(self, split: DeviceImages) -> float:
        """The temperature of the softmax, by the split judged last; a rank's own share of it is enough."""
        world, batch = self._training.world, evaluation_batch(*split.size)
        own = split.labels.cpu().split(batch)[world.rank :: world.size]
        return temperature(self._own, torch.cat(own)) if self._own is not None and own else 1.0

    def evaluate(self, epoch: int, name: str, split: DeviceImages, classes: int) -> Evaluation:
        """Evaluate the model on a split and report it."""
        training, clock = self._training, time.perf_counter()
        kept = name != "train"
        result = evaluate(training.model, split, classes, keep_probabilities=kept, world=training.world)
        self._own = result.probabilities
        if training.world.size > 1:  # those of this rank's batches only
            result = replace(result, probabilities=None)
        taken = time.perf_counter() - clock
        self.seconds["evaluate"] += taken
        if not math.isfinite(result.loss):
            raise self._diverged("evaluation", training.step - 1)
        self._observer.evaluated(epoch, name, result, taken)
        return result


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the objects that exist already from the garbage collector: it would visit all in mid-step."""
    with ExitStack() as stack:
        if not gc.get_freeze_count():  # else the caller has frozen them, and will unfreeze them
            stack.callback(gc.unfreeze)
            gc.freeze()
        yield


@contextmanager
def quick(model: nn.Module, *, alone: bool = True) -> Iterator[None]:
    """Leave out work that takes time and changes nothing; ranks that average gradients need all of them."""
    with ExitStack() as stack:
        if alone:
            stack.enter_context(without_redundant_biases(model))
            stack.enter_context(one_stem(model))
        stack.enter_context(quick_layers(model))
        yield


def redundant_biases(model: nn.Module) -> list[Tensor]:
    """Return the biases of convolutions whose output goes into one batch normalization and nowhere else.

    Batch normalization subtracts the mean over the batch, and with it whatever was added to a whole channel
    before (Ioffe and Szegedy 2015, section 3.2). The gradient of such a bias is zero. A backward pass would
    compute its rounding error, and read the largest gradients of a network once more for it.
    """
    pairs = convolutions_before_batch_norm(model)
    return [convolution.bias for convolution, _ in pairs if convolution.bias is not None]


@contextmanager
def without_redundant_biases(model: nn.Module) -> Iterator[None]:
    """Leave out the gradients of ``redundant_biases`` for a while."""
    with ExitStack() as stack:
        for bias in redundant_biases(model):
            stack.callback(bias.requires_grad_, bias.requires_grad)
            bias.requires_grad_(False)
        yield
