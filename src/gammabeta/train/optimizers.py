"""The optimizers: one operator of PyTorch moves all parameters of a kind.

``torch.optim`` takes the same steps. But it serves hooks, profilers and closures and sorts its tensors at
every step, which costs several times as much as the arithmetic of a small network. And making one loads
PyTorch's compiler, which takes a third as long as a whole training.
"""

import torch
from torch import Tensor, nn

from .recipe import Recipe

_EPS = 1e-8  # of AdamW, as PyTorch's


class Optimizer:
    """What all share: parameters in groups, weight decay only for those of two axes and more, buffers.

    γ, β and biases do not decay.

    Attributes:
        buffers: of each kind of buffer, the buffer of each parameter that has been moved, in the parameter's
            own layout.
    """

    kinds: tuple[str, ...]  # of buffers

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self._momentum = recipe.momentum
        self.buffers: dict[str, dict[Tensor, Tensor]] = {kind: {} for kind in self.kinds}
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

    def clip(self, most: float) -> None:
        """Scale all gradients down together if their norm is more than ``most`` (Pascanu et al. 2013)."""
        nn.utils.clip_grad_norm_([p for p in self._parameters if p.grad is not None], most)

    @torch.no_grad()
    def step(self, rate: float, momentum: float | None = None) -> None:
        """Move the parameters that have a gradient; ``momentum``: another one than the recipe's."""
        momentum = self._momentum if momentum is None else momentum
        for decay, group in self._groups:
            if parameters := [p for p in group if p.grad is not None]:
                self._move(parameters, decay, rate, momentum)

    def _move(self, parameters: list[Tensor], decay: float, rate: float, momentum: float) -> None:
        raise NotImplementedError

    def restore(self, kind: str, parameter: Tensor, value: Tensor) -> None:
        """Take a buffer of a checkpoint."""
        if kind in self.buffers:
            # In the parameter's own layout: the fused operator walks both in the order of memory.
            self.buffers[kind][parameter] = torch.empty_like(parameter.detach()).copy_(value)


class SGD(Optimizer):
    """Stochastic gradient descent with momentum.

    With weight decay λ, momentum μ and learning rate η: ``g ← g + λ w``, then ``b ← μ b + g`` (at first
    ``b = g``) and ``w ← w - η b``, or ``w - η (g + μ b)`` with Nesterov's (Sutskever et al. 2013, as PyTorch
    has it).
    """

    kinds = ("momentum_buffer",)

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__(model, recipe)
        self._nesterov = recipe.nesterov

    @property
    def momentum_buffers(self) -> dict[Tensor, Tensor]:
        """``b`` of each parameter that has been moved."""
        return self.buffers["momentum_buffer"]

    def _move(self, parameters: list[Tensor], decay: float, rate: float, momentum: float) -> None:
        held = self.momentum_buffers
        new = [p for p in parameters if p not in held] if self._momentum else []
        if new:
            held |= {p: torch.empty_like(p) for p in new}
            self._fused(new, decay, rate, momentum, first=True)
            parameters = [p for p in parameters if p not in {*new}]
        if parameters:
            self._fused(parameters, decay, rate, momentum, first=False)

    def _fused(
        self, parameters: list[Tensor], decay: float, rate: float, momentum: float, *, first: bool
    ) -> None:
        torch._fused_sgd_(
            parameters,
            [p.grad for p in parameters],  # type: ignore[misc]
            [self.momentum_buffers[p] for p in parameters] if self._momentum else [],
            weight_decay=decay,
            momentum=momentum,
            lr=rate,
            dampening=0.0,
            nesterov=self._nesterov,
            maximize=False,
            is_first_step=first,
        )


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2, as PyTorch has it).

    The recipe's ``momentum`` is β₁. ``exp_avg`` and ``exp_avg_sq`` hold the moving averages of the gradient
    and of its square; ``steps`` counts the steps of each parameter, which undoes their bias towards 0.
    """

    kinds = ("exp_avg", "exp_avg_sq", "steps")

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__(model, recipe)
        self._second = recipe.second_momentum

    def _move(self, parameters: list[Tensor], decay: float, rate: float, momentum: float) -> None:
        first, second, steps = self.buffers.values()
        for p in parameters:
            if p not in first:
                first[p], second[p] = torch.zeros_like(p), torch.zeros_like(p)
                steps[p] = torch.zeros((), device=p.device)
        torch._foreach_add_([steps[p] for p in parameters], 1)
        torch._fused_adamw_(
            parameters,
            [p.grad for p in parameters],  # type: ignore[misc]
            [first[p] for p in parameters],
            [second[p] for p in parameters],
            [],
            [steps[p] for p in parameters],
            lr=rate,
            beta1=momentum,
            beta2=self._second,
            weight_decay=decay,
            eps=_EPS,
            amsgrad=False,
            maximize=False,
        )

    def restore(self, kind: str, parameter: Tensor, value: Tensor) -> None:
        """Take a buffer of a checkpoint."""
        if kind == "steps":
            self.buffers[kind][parameter] = value.to(parameter.device, torch.float32).reshape(()).clone()
        else:
            super().restore(kind, parameter, value)


def optimizer_of(model: nn.Module, recipe: Recipe) -> Optimizer:
    """Return the optimizer that a recipe names, for a model's parameters."""
    return (AdamW if recipe.optimizer == "adamw" else SGD)(model, recipe)


class Average:
    """The mean of a model's weights over the last part of a training.

    ``swa``: all steps count alike (Izmailov et al. 2018); ``ema``: the newest has the recipe's weight (Polyak
    and Juditsky 1992). Batch statistics are of one set of weights, so they are measured anew afterwards.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, steps: int) -> None:
        self._model, self._recipe = model, recipe
        self._first = min(int(recipe.average_from * steps), steps - 1)
        self.tensors: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step, from 0."""
        if self._recipe.average == "none" or step < self._first:
            return
        if not self.tensors:
            self.tensors = {name: p.detach().clone() for name, p in self._model.named_parameters()}
            return
        swa = self._recipe.average == "swa"
        weight = 1 / (step - self._first + 1) if swa else self._recipe.average_weight
        torch._foreach_lerp_([*self.tensors.values()], [*self._model.parameters()], weight)

    @torch.no_grad()
    def give(self) -> None:
        """Give the model the mean in place of its weights, if there is one."""
        for name, parameter in self._model.named_parameters():
            if name in self.tensors:
                parameter.copy_(self.tensors[name])
