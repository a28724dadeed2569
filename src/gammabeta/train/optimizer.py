"""Stochastic gradient descent, and a step of it without what ``step`` does for others on the way."""

from typing import Any

import torch
from torch import Tensor, nn

from .recipe import Recipe

_BUFFER = "momentum_buffer"


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """Return stochastic gradient descent whose weight decay spares γ, β and biases."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    spared = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": recipe.weight_decay}]
    if recipe.weight_decay:
        groups.append({"params": spared, "weight_decay": 0.0})
    else:
        decayed += spared
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        fused=True,
    )


class Descent:
    """Takes the steps of an optimiser that ``make_optimizer`` made.

    ``SGD.step`` serves hooks, profilers and closures and sorts its tensors by device and dtype at every step,
    which costs several times what the arithmetic of a small network does. Where all parameters are alike and
    have their momentum, its one fused operator is called here directly, with the same result.
    """

    def __init__(self, optimizer: torch.optim.SGD) -> None:
        self.optimizer = optimizer
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._alike = len({(p.device, p.dtype) for p in self._parameters}) == 1

    def forget(self) -> None:
        """Drop all gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move the parameters along their gradients, with this learning rate."""
        plans = [self._plan(group, rate) for group in self.optimizer.param_groups]
        if not self._alike or None in plans:  # the first step makes the momentum buffers
            self.optimizer.step()
            return
        for group, plan in zip(self.optimizer.param_groups, plans, strict=True):
            parameters, gradients, buffers = plan  # type: ignore[misc]
            if not parameters:
                continue
            torch._fused_sgd_(
                parameters,
                gradients,
                buffers,
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=rate,
                dampening=0.0,
                nesterov=group["nesterov"],
                maximize=False,
                is_first_step=False,
            )

    def _plan(
        self, group: dict[str, Any], rate: float
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]] | None:
        """Parameters, their gradients and momentum buffers; None if one that should be there is missing."""
        group["lr"] = rate
        parameters = [p for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        if not group["momentum"]:
            return parameters, gradients, []
        state = self.optimizer.state
        buffers = [state[p].get(_BUFFER) for p in parameters]
        return None if any(b is None for b in buffers) else (parameters, gradients, buffers)
