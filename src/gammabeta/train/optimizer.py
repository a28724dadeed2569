"""Stochastic gradient descent with momentum, and the learning rate of each step.

One operator of PyTorch moves all parameters of a kind. ``torch.optim.SGD`` takes the same step. But it serves
hooks, profilers and closures and sorts its tensors at every step, which costs several times as much as the
arithmetic of a small network. And making one loads PyTorch's compiler, which takes a third as long as a whole
training.
"""

import math

import torch
from torch import Tensor, nn

from .recipe import Recipe


class SGD:
    """Moves a model's parameters; weight decay spares γ, β and biases.

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
