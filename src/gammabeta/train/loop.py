"""The training loop and its optimizer: no Python per sample, no waiting for the device within a step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import WeightsError
from ..files import check_fit, check_values, fit_weights
from .batches import DeviceImages, Order, generator_for, mixing_share
from .evaluate import LayerStatistics, layer_statistics
from .objective import Objective
from .optimizers import SGD, AdamW, Average, optimizer_of
from .recipe import Recipe
from .world import ALONE, Precision, World

STATISTICS_IMAGES = 256  # images on which the layers' statistics are measured
MOVING_WEIGHT = 0.01  # of the newest batch in the moving loss and accuracy, as in the notebook
_AUGMENT, _DRAW = 1, 4  # purposes of random streams, beside the epochs' permutations


@dataclass(frozen=True)
class Progress:
    """Where a training is; both figures are debiased moving averages over its batches.

    The loss is the plain cross-entropy in nats, whatever the recipe adds to what it minimises.
    """

    step: int
    steps: int
    epoch: int
    images: int
    loss: float
    accuracy: float
    learning_rate: float
    epochs: float = 0.0  # passes over the training images so far


@dataclass(frozen=True)
class State:
    """A training between two steps, as a checkpoint holds it: tensors by name, and plain JSON values."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Training:
    """A training that goes on step by step; between any two steps it can be stored and restored.

    The model is trained in place, on the device of the data. ``precision`` is that of convolutions and matrix
    products; parameters and statistics are float32 always. The ranks of ``world`` take the steps together:
    each must call the same methods in the same order.
    """

    def __init__(
        self,
        model: nn.Module,
        data: DeviceImages,
        recipe: Recipe,
        seed: int,
        precision: Precision,
        world: World = ALONE,
    ) -> None:
        self.model, self.data, self.recipe = model, data, recipe
        self.seed, self.precision, self.world = seed, precision, world
        self._device = data.labels.device
        self._network = world.wrap(model, self._device)
        # Ranks with uneven shares can only add sums: then a step's loss is summed over its images.
        self._summed = recipe.loss == "sum" or world.size > 1
        self.order = Order(len(data), recipe, seed)
        self.steps = self.order.steps
        self.step = 0
        self.images = 0
        self.judged = True  # whether the epoch of the last step is over, its evaluation included
        self.best, self.worse = math.inf, 0  # the lowest loss of an epoch, and the epochs since
        self.diverged: int | None = None  # the first step whose loss was not finite
        self._optimizer = optimizer_of(model, recipe)
        self.after_step: Callable[[], None] | None = None
        self._objective = Objective(recipe, data.labels, summed=self._summed)
        self.average = Average(model, recipe, self.steps)
        self.rate: Callable[[int], float] = lambda step: learning_rate(recipe, step, self.steps)
        self._unread: list[tuple[Tensor, Tensor, Tensor, int]] = []  # objective, logits, labels, images
        self._loss = self._accuracy = float("nan")
        self.newest_loss = float("nan")  # of the last step that was read, not averaged

    def state(self) -> State:
        """Return everything that ``restore`` needs to go on from here, bit for bit."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        for kind, held in self._optimizer.buffers.items():
            tensors |= {f"optimizer.{kind}.{names[p]}": buffer for p, buffer in held.items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.tensors.items()}
        tensors["random.cpu"] = torch.get_rng_state()  # for networks that draw numbers of their own
        if self._device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self._device)
        self.progress()  # reads the figures that are still on the device
        values: dict[str, Any] = {"step": self.step, "images": self.images, "judged": self.judged}
        values |= {"worse": self.worse, "lowest": self.best if self.best < math.inf else None}
        return State(tensors, values | {"loss": self._loss, "accuracy": self._accuracy})

    def restore(self, state: State) -> None:
        """Go on from a state of the same recipe, seed and data, and network (else ``WeightsError``)."""
        check_state(state, self.model, "the checkpoint")
        kinds = _kinds(state.tensors)
        fit_weights(self.model, kinds["model"], "the checkpoint")
        parameters = dict(self.model.named_parameters())
        for name, tensor in kinds["optimizer"].items():
            kind, _, parameter = name.partition(".")
            self._optimizer.restore(kind, parameters[parameter], tensor)
        self.average.tensors = {
            name: torch.empty_like(parameters[name].detach()).copy_(tensor)
            for name, tensor in kinds["average"].items()
        }
        if "cpu" in kinds["random"]:
            torch.set_rng_state(kinds["random"]["cpu"])
        if self._device.type == "cuda" and "cuda" in kinds["random"]:
            torch.cuda.set_rng_state(kinds["random"]["cuda"], self._device)
        self.step, self.images = state.values["step"], state.values["images"]
        self.judged = state.values["judged"]
        lowest = state.values.get("lowest")
        self.best = math.inf if lowest is None else lowest
        self.worse = state.values.get("worse", 0)
        figures = (state.values["loss"], state.values["accuracy"])
        self._loss, self._accuracy = (float("nan") if value is None else value for value in figures)

    @property
    def epoch(self) -> int:
        """The epoch that is being trained or judged, from 0."""
        return (self.step if self.judged else self.step - 1) // self.order.steps_per_epoch

    def tired(self, loss: float) -> bool:
        """Take the loss of an epoch on held-out images; return whether patience with the training is over."""
        self.worse = 0 if loss < self.best else self.worse + 1
        self.best = min(self.best, loss)
        return 0 < self.recipe.patience <= self.worse

    def advance(self, steps: int) -> None:
        """Take that many steps, or as many as are left."""
        self.model.train()
        for _ in range(min(steps, self.steps - self.step)):
            self._take_step()

    def _take_step(self) -> None:
        index = self.order.indices(self.step).to(self._device, non_blocking=True)
        count, part = len(index), None
        if self.world.size > 1:
            part = self.world.part(count)
            # What the network itself draws, for dropout say, is each rank's own and the same after a restart.
            torch.manual_seed(generator_for(self.seed, self.step, _DRAW, self.world.rank).initial_seed())
        x, y = self._augmented(index, part)
        other, share = None, 1.0
        if self.recipe.mixup_alpha:
            share = mixing_share(self.recipe.mixup_alpha, self.seed, self.step)
            x, other = self._mixed(x, y, share, index, part)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self._network(x)
        logits = logits.float()
        loss = self._objective(logits, y, other, share)
        self._optimizer.zero_grad()
        goal = loss
        if self.world.size > 1:  # scaled so that the ranks' *average* is the recipe's loss
            goal = loss * (self.world.size / (count if self.recipe.loss == "mean" else 1))
        goal.backward()
        if self.recipe.clip:
            self._optimizer.clip(self.recipe.clip)
        self._optimizer.step(self.rate(self.step), momentum(self.recipe, self.step, self.steps))
        self.average.update(self.step)
        self._unread.append((loss.detach(), logits.detach(), y, count))
        self.step += 1
        self.images += count
        self.judged = False
        if self.after_step is not None:
            self.after_step()

    def first_images(self) -> Tensor:
        """The images of the first step as the network is given them, float32 ``(B, C, H, W)``."""
        return first_batch(self.data, self.order, self.seed)

    def _augmented(self, index: Tensor, part: slice | Tensor | None) -> tuple[Tensor, Tensor]:
        """The images of a step, or those at the places ``part`` in it, augmented as they are in the whole."""
        augment = generator_for(self.seed, self.step, _AUGMENT) if self.data.augmented else None
        return self.data.batch(index, augment, part)

    def _mixed(
        self, x: Tensor, y: Tensor, share: float, index: Tensor, part: slice | None
    ) -> tuple[Tensor, Tensor]:
        """Images blended with those at the mirrored places of the step, and these images' labels."""
        if part is None:
            others, labels = x.flip(0), y.flip(0)
        else:
            others, labels = self._augmented(index, torch.arange(len(index)).flip(0)[part])
        return torch.lerp(others, x, share), labels

    def layer_statistics(self) -> dict[str, LayerStatistics]:
        """Measure the batch-norm layers on the first training images; the training is left as it was."""
        return layer_statistics(self.model, self.data.batch(slice(0, STATISTICS_IMAGES))[0], self.precision)

    def progress(self) -> Progress:
        """Read the figures of the steps since the last call from the device; return where the training is."""
        if self._unread:
            figures = self.world.all_reduce(_figures(self._unread)).tolist()
            first = self.step - len(self._unread)
            rows = zip(figures, self._unread, strict=True)
            for step, ((objective, loss, hits), (*_, count)) in enumerate(rows, first):
                if self.diverged is None and not math.isfinite(objective):
                    self.diverged = step
                self.newest_loss = loss / count
                self._loss = _move(self._loss, loss / count, step)
                self._accuracy = _move(self._accuracy, hits / count, step)
            self._unread.clear()
        return Progress(
            step=self.step,
            steps=self.steps,
            epoch=self.epoch,
            epochs=self.step / self.order.steps_per_epoch,
            images=self.images,
            loss=self._loss,
            accuracy=self._accuracy,
            learning_rate=self.rate(min(self.step, self.steps - 1)),
        )


def first_batch(data: DeviceImages, order: Order, seed: int) -> Tensor:
    """The images of the first step as the network is given them, float32 ``(B, C, H, W)``."""
    return data.batch(order.indices(0), generator_for(seed, 0, _AUGMENT))[0]


def _kinds(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a state: the model's, the optimizer's, the random generators'."""
    kinds: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "average": {}, "random": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        kinds.setdefault(kind, {})[rest] = tensor
    return kinds


def check_state(state: State, model: nn.Module, source: object) -> None:
    """Raise ``WeightsError`` unless a training of this model can go on from a state; change nothing."""
    kinds, wanted = _kinds(state.tensors), model.state_dict()
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    buffers = {f"{kind}.{n}": p for kind in (*SGD.kinds, *AdamW.kinds) for n, p in parameters.items()}
    buffers |= {f"steps.{name}": p.new_zeros(()) for name, p in parameters.items()}
    for kind, known in (("model", wanted), ("optimizer", buffers), ("average", parameters)):
        for name, tensor in kinds[kind].items():
            if name not in known:
                raise WeightsError(f"{source} does not fit the network, which has no {name[:100]}")
            check_fit(name, tensor, known[name], source)
        check_values(kinds[kind], source)
    if missing := [name for name in wanted if name not in kinds["model"]]:
        raise WeightsError(f"{source} does not fit the network: it lacks {missing[0]}")
    if "cpu" in kinds["random"]:
        try:
            torch.Generator().set_state(kinds["random"]["cpu"])
        except (RuntimeError, TypeError):
            raise WeightsError(f"{source} holds no state of PyTorch's random generator") from None


def _move(average: float, new: float, step: int) -> float:
    """The moving average after a step, from 0: debiased, so that the first counts no more."""
    if average != average:
        return new
    return average + (new - average) * MOVING_WEIGHT / (1 - (1 - MOVING_WEIGHT) ** (step + 1))


def _figures(steps: list[tuple[Tensor, Tensor, Tensor, int]]) -> Tensor:
    """Objective, plain cross-entropy and hits of each step, summed: float64 ``(steps, 3)``."""
    objectives, logits, labels, _ = zip(*steps, strict=True)
    every, truth = torch.cat(logits), torch.cat(labels)
    losses = F.cross_entropy(every, truth, reduction="none").double()
    hits = (every.argmax(1) == truth).double()
    lengths = torch.tensor([len(part) for part in labels])
    step = torch.arange(len(steps)).repeat_interleave(lengths).to(hits.device)
    sums = [hits.new_zeros(len(steps)).index_add_(0, step, each) for each in (losses, hits)]
    return torch.stack((torch.stack(objectives).double(), *sums), 1)


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Return the learning rate of step ``step`` (from 0) of ``steps``: a linear warm-up, then a fall.

    The rate is taken in the middle of the step, so that no step is wasted at zero. One cycle (Smith 2018)
    rises from a 25th of the highest rate, by a cosine.
    """
    position = (step + 0.5) / steps
    if position < recipe.warmup:
        if recipe.schedule == "one-cycle":
            return recipe.learning_rate * (0.04 + 0.96 * _eased(position / recipe.warmup))
        return recipe.learning_rate * position / recipe.warmup
    if recipe.schedule == "constant":
        return recipe.learning_rate
    gone = (position - recipe.warmup) / (1 - recipe.warmup)
    left = 1 - gone if recipe.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * gone))
    last = recipe.final_learning_rate
    return recipe.learning_rate * (last + (1 - last) * left)


def momentum(recipe: Recipe, step: int, steps: int) -> float:
    """Return the momentum of a step: of one cycle 0.1 less at the highest rate (Smith 2018, 4.3)."""
    if recipe.schedule != "one-cycle":
        return recipe.momentum
    position = (step + 0.5) / steps
    risen = position < recipe.warmup
    gone = position / recipe.warmup if risen else (position - recipe.warmup) / (1 - recipe.warmup)
    height = _eased(gone) if risen else 1 - _eased(gone)
    return max(0.0, recipe.momentum - 0.1 * height)


def _eased(gone: float) -> float:
    """From 0 to 1 along half a cosine."""
    return 0.5 * (1 - math.cos(math.pi * gone))
