"""Stochastic gradient descent with momentum, in one operator of PyTorch's for all parameters of a kind.

``torch.optim.SGD`` takes the same step. But it serves hooks, profilers and closures and sorts its tensors at
every step, which costs several times what the arithmetic of a small network does, and making one loads
PyTorch's compiler, which takes as long as a third of a whole training.
"""

import torch
from torch import Tensor, nn

from .recipe import Recipe


class Descent:
    """Moves a model's parameters; weight decay spares γ, β and biases.

    With weight decay λ, momentum μ and learning rate η: ``g ← g + λ w``, then ``b ← μ b + g`` (at first
    ``b = g``) and ``w ← w - η b``, or ``w - η (g + μ b)`` with Nesterov's (Sutskever et al. 2013, as PyTorch
    has it).

    Attributes:
        momenta: ``b`` of each parameter that has been moved, in the parameter's own layout.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self._momentum, self._nesterov = recipe.momentum, recipe.nesterov
        self.momenta: dict[Tensor, Tensor] = {}
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        kinds: dict[tuple[torch.device, torch.dtype, float], list[Tensor]] = {}
        for parameter in self._parameters:
            decay = recipe.weight_decay if parameter.dim() > 1 else 0.0
            kinds.setdefault((parameter.device, parameter.dtype, decay), []).append(parameter)
        self._groups = [(decay, parameters) for (_, _, decay), parameters in kinds.items()]

    def forget(self) -> None:
        """Drop all gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move the parameters that have a gradient, with this learning rate."""
        for decay, group in self._groups:
            parameters = [p for p in group if p.grad is not None]
            new = [p for p in parameters if p not in self.momenta] if self._momentum else []
            if new:
                self.momenta |= {p: torch.empty_like(p) for p in new}
                self._move(new, decay, rate, first=True)
                parameters = [p for p in parameters if p not in {*new}]
            if parameters:
                self._move(parameters, decay, rate, first=False)

    def _move(self, parameters: list[Tensor], decay: float, rate: float, *, first: bool) -> None:
        torch._fused_sgd_(
            parameters,
            [p.grad for p in parameters],  # type: ignore[misc]
            [self.momenta[p] for p in parameters] if self._momentum else [],
            weight_decay=decay,
            momentum=self._momentum,
            lr=rate,
            dampening=0.0,
            nesterov=self._nesterov,
            maximize=False,
            is_first_step=first,
        )
