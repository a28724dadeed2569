"""``Descent`` takes the very steps of the optimiser it holds."""

import copy

import pytest
import torch
from torch import nn

from gammabeta.train import load_recipe
from gammabeta.train.optimizer import Descent, make_optimizer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        {"weight_decay": 0.01},
    ],
)
def test_steps_are_the_optimisers_bit_for_bit(settings: dict[str, object]) -> None:
    recipe = load_recipe("classic", settings)
    ours = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 5))
    theirs = copy.deepcopy(ours)
    descent, optimizer = Descent(make_optimizer(ours, recipe)), make_optimizer(theirs, recipe)
    for step in range(4):
        x, upstream = torch.randn(6, 2, 5, 5), torch.randn(6, 5)
        for model in (ours, theirs):
            (model(x) * upstream).sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        optimizer.step()
        optimizer.zero_grad()
        descent.step(0.1 / (step + 1))
        descent.forget()
        assert all(p.grad is None for p in ours.parameters())
    for our, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(our, their)
    assert descent.optimizer.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


def test_mixed_dtypes_and_missing_gradients_are_served() -> None:
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2).double(), nn.Linear(2, 2)])
    descent = Descent(make_optimizer(model, load_recipe("classic", {"momentum": 0.5})))
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        model[0](torch.ones(1, 3)).sum().backward()
        model[1](torch.ones(1, 3).double()).sum().backward()
        descent.step(0.1)
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert moved == [True] * 4 + [False] * 2


def test_without_any_gradient_nothing_moves() -> None:
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    Descent(make_optimizer(model, load_recipe("classic"))).step(0.1)
    assert torch.equal(model.weight, before)
