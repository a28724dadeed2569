"""The training loop and its optimizer: no Python per sample, no waiting for the device within a step."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import WeightsError
from ..files import check_fit, check_values, fit_weights
from .batches import DeviceImages, Order, generator_for
from .evaluate import LayerStatistics, layer_statistics
from .recipe import Recipe
from .world import ALONE, Precision, World

STATISTICS_IMAGES = 256  # images on which the layers' statistics are measured
MOVING_WEIGHT = 0.01  # of the newest batch in the moving loss and accuracy, as in the notebook
_AUGMENT, _DRAW = 1, 4  # purposes of random streams, beside the epochs' permutations


@dataclass(frozen=True)
class Progress:
    """Where a training is; the loss is the mean over a batch in nats, both figures moving averages."""

    step: int
    steps: int
    epoch: int
    images: int
    loss: float
    accuracy: float
    learning_rate: float


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
        self.diverged: int | None = None  # the first step whose loss was not finite
        self._optimizer = SGD(model, recipe)
        self._unread: list[tuple[Tensor, Tensor, Tensor, int]] = []  # loss, logits, labels, images
        self._loss = self._accuracy = float("nan")

    def state(self) -> State:
        """Return everything that ``restore`` needs to go on from here, bit for bit."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            if parameter in self._optimizer.momentum_buffers:
                tensors[f"optimizer.momentum_buffer.{name}"] = self._optimizer.momentum_buffers[parameter]
        tensors["random.cpu"] = torch.get_rng_state()  # for networks that draw numbers of their own
        if self._device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self._device)
        self.progress()  # reads the figures that are still on the device
        values: dict[str, Any] = {"step": self.step, "images": self.images, "judged": self.judged}
        return State(tensors, values | {"loss": self._loss, "accuracy": self._accuracy})

    def restore(self, state: State) -> None:
        """Go on from a state of the same recipe, seed and data, and network (else ``WeightsError``)."""
        check_state(state, self.model, "the checkpoint")
        kinds = _kinds(state.tensors)
        fit_weights(self.model, kinds["model"], "the checkpoint")
        parameters = dict(self.model.named_parameters())
        for name, tensor in kinds["optimizer"].items():
            parameter = parameters[name.removeprefix(_BUFFER)]
            # In the parameter's own layout: the fused operator walks both in the order of memory.
            self._optimizer.momentum_buffers[parameter] = torch.empty_like(parameter.detach()).copy_(tensor)
        if "cpu" in kinds["random"]:
            torch.set_rng_state(kinds["random"]["cpu"])
        if self._device.type == "cuda" and "cuda" in kinds["random"]:
            torch.cuda.set_rng_state(kinds["random"]["cuda"], self._device)
        self.step, self.images = state.values["step"], state.values["images"]
        self.judged = state.values["judged"]
        figures = (state.values["loss"], state.values["accuracy"])
        self._loss, self._accuracy = (float("nan") if value is None else value for value in figures)

    @property
    def epoch(self) -> int:
        """The epoch that is being trained or judged, from 0."""
        return (self.step if self.judged else self.step - 1) // self.order.steps_per_epoch

    def advance(self, steps: int) -> None:
        """Take that many steps, or as many as are left."""
        self.model.train()
        for _ in range(min(steps, self.steps - self.step)):
            self._take_step()

    def _take_step(self) -> None:
        index = self.order.indices(self.step).to(self._device, non_blocking=True)
        augmented = self.recipe.shift or self.recipe.flip
        augment = generator_for(self.seed, self.step, _AUGMENT) if augmented else None
        count, part = len(index), None
        if self.world.size > 1:
            part = self.world.part(count)
            # What the network itself draws, for dropout say, is each rank's own and the same after a restart.
            torch.manual_seed(generator_for(self.seed, self.step, _DRAW, self.world.rank).initial_seed())
        x, y = self.data.batch(index, augment, part)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self._network(x)
        logits = logits.float()
        loss = F.cross_entropy(
            logits,
            y,
            reduction="sum" if self._summed else "mean",
            label_smoothing=self.recipe.label_smoothing,
        )
        self._optimizer.zero_grad()
        goal = loss
        if self.world.size > 1:  # scaled so that the ranks' *average* is the recipe's loss
            goal = loss * (self.world.size / (count if self.recipe.loss == "mean" else 1))
        goal.backward()
        self._optimizer.step(learning_rate(self.recipe, self.step, self.steps))
        self._unread.append((loss.detach(), logits.detach(), y, count))
        self.step += 1
        self.images += count
        self.judged = False

    def layer_statistics(self) -> dict[str, LayerStatistics]:
        """Measure the batch-norm layers on the first training images; the training is left as it was."""
        return layer_statistics(self.model, self.data.batch(slice(0, STATISTICS_IMAGES))[0], self.precision)

    def progress(self) -> Progress:
        """Read the figures of the steps since the last call from the device; return where the training is."""
        if self._unread:
            figures = self.world.all_reduce(_figures(self._unread)).tolist()
            first = self.step - len(self._unread)
            rows = zip(figures, self._unread, strict=True)
            for step, ((loss, hits), (*_, count)) in enumerate(rows, first):
                if self.diverged is None and not math.isfinite(loss):
                    self.diverged = step
                self._loss = _move(self._loss, loss / count if self._summed else loss)
                self._accuracy = _move(self._accuracy, hits / count)
            self._unread.clear()
        return Progress(
            step=self.step,
            steps=self.steps,
            epoch=self.epoch,
            images=self.images,
            loss=self._loss,
            accuracy=self._accuracy,
            learning_rate=learning_rate(self.recipe, min(self.step, self.steps - 1), self.steps),
        )


_BUFFER = "momentum_buffer."


def _kinds(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a state: the model's, the optimizer's, the random generators'."""
    kinds: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "random": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        kinds.setdefault(kind, {})[rest] = tensor
    return kinds


def check_state(state: State, model: nn.Module, source: object) -> None:
    """Raise ``WeightsError`` unless a training of this model can go on from a state; change nothing."""
    kinds, wanted = _kinds(state.tensors), model.state_dict()
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    for kind, known in (("model", wanted), ("optimizer", {_BUFFER + n: p for n, p in parameters.items()})):
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


def _move(average: float, new: float) -> float:
    return new if average != average else (1 - MOVING_WEIGHT) * average + MOVING_WEIGHT * new


def _figures(steps: list[tuple[Tensor, Tensor, Tensor, int]]) -> Tensor:
    """Loss and hits of each step, float64 ``(steps, 2)``, in a few operations for all of them."""
    losses, logits, labels, _ = zip(*steps, strict=True)
    hits = (torch.cat(logits).argmax(1) == torch.cat(labels)).double()
    lengths = torch.tensor([len(part) for part in labels])
    step = torch.arange(len(steps)).repeat_interleave(lengths).to(hits.device)
    return torch.stack(
        (torch.stack(losses).double(), hits.new_zeros(len(steps)).index_add_(0, step, hits)), 1
    )


class SGD:
    """Stochastic gradient descent with momentum; weight decay spares γ, β and biases.

    One operator of PyTorch moves all parameters of a kind. ``torch.optim.SGD`` takes the same step. But it
    serves hooks, profilers and closures and sorts its tensors at every step, which costs several times as
    much as the arithmetic of a small network. And making one loads PyTorch's compiler, which takes a third as
    long as a whole training.

    With weight decay λ, momentum μ and learning rate η: ``g ← g + λ w``, then ``b ← μ b + g`` (at first
    ``b = g``) and ``w ← w - η b``, or ``w - η (g + μ b)`` with Nesterov's (Sutskever et al. 2013, as PyTorch
    has it).

    Attributes:
        momentum_buffers: ``b`` of each parameter that has been moved, in the parameter's own layout.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self._momentum, self._nesterov = recipe.momentum, recipe.nesterov
        self.momentum_buffers: dict[Tensor, Tensor] = {}
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        kinds: dict[tuple[torch.device, torch.dtype, float], list[Tensor]] = {}
        for parameter in self._parameters:
            decay = recipe.weight_decay if parameter.dim() > 1 else 0.0
            kinds.setdefault((parameter.device, parameter.dtype, decay), []).append(parameter)
        self._groups = [(decay, parameters) for (_, _, decay), parameters in kinds.items()]

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move the parameters that have a gradient, with this learning rate."""
        for decay, group in self._groups:
            parameters = [p for p in group if p.grad is not None]
            new = [p for p in parameters if p not in self.momentum_buffers] if self._momentum else []
            if new:
                self.momentum_buffers |= {p: torch.empty_like(p) for p in new}
                self._move(new, decay, rate, first=True)
                parameters = [p for p in parameters if p not in {*new}]
            if parameters:
                self._move(parameters, decay, rate, first=False)

    def _move(self, parameters: list[Tensor], decay: float, rate: float, *, first: bool) -> None:
        torch._fused_sgd_(
            parameters,
            [p.grad for p in parameters],  # type: ignore[misc]
            [self.momentum_buffers[p] for p in parameters] if self._momentum else [],
            weight_decay=decay,
            momentum=self._momentum,
            lr=rate,
            dampening=0.0,
            nesterov=self._nesterov,
            maximize=False,
            is_first_step=first,
        )


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Return the learning rate of step ``step`` (from 0) of ``steps``: a linear warm-up, then a fall.

    The rate is taken in the middle of the step, so that no step is wasted at zero.
    """
    position = (step + 0.5) / steps
    if position < recipe.warmup:
        return recipe.learning_rate * position / recipe.warmup
    if recipe.schedule == "constant":
        return recipe.learning_rate
    gone = (position - recipe.warmup) / (1 - recipe.warmup)
    left = 1 - gone if recipe.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * gone))
    last = recipe.final_learning_rate
    return recipe.learning_rate * (last + (1 - last) * left)
