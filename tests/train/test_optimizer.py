"""``SGD`` takes the very steps of ``torch.optim.SGD``."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from gammabeta.train import load_recipe
from gammabeta.train.optimizers import SGD


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        {"weight_decay": 0.01},
    ],
)
def test_steps_are_torchs_bit_for_bit(settings: dict[str, float]) -> None:
    recipe = load_recipe("classic", settings)
    ours = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 5))
    theirs = copy.deepcopy(ours)
    decay = settings.get("weight_decay", 0.0)
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in theirs.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(
        groups,
        lr=1.0,
        momentum=settings.get("momentum", recipe.momentum),
        nesterov=bool(settings.get("nesterov")),
        fused=True,
    )
    sgd = SGD(ours, recipe)
    for step in range(4):
        x, upstream = torch.randn(6, 2, 5, 5), torch.randn(6, 5)
        for model in (ours, theirs):
            (model(x) * upstream).sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        optimizer.step()
        optimizer.zero_grad()
        sgd.step(0.1 / (step + 1))
        sgd.zero_grad()
        assert all(p.grad is None for p in ours.parameters())
    for our, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(our, their)
        if recipe.momentum:
            assert torch.equal(sgd.momentum_buffers[our], optimizer.state[their]["momentum_buffer"])


def test_mixed_dtypes_and_missing_gradients_are_served() -> None:
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2).double(), nn.Linear(2, 2)])
    sgd = SGD(model, load_recipe("classic", {"momentum": 0.5}))
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        model[0](torch.ones(1, 3)).sum().backward()
        model[1](torch.ones(1, 3).double()).sum().backward()
        sgd.step(0.1)
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert moved == [True] * 4 + [False] * 2


def test_a_parameter_may_get_its_first_gradient_later() -> None:
    model = nn.ModuleList([nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)])
    sgd = SGD(model, load_recipe("classic", {"momentum": 0.5}))
    start = [p.item() for p in model.parameters()]
    for used in (model[:1], model):
        sgd.zero_grad()
        sum(layer(torch.ones(1, 1)).sum() for layer in used).backward()  # type: ignore[union-attr]
        sgd.step(0.1)
    first, second = (p.item() for p in model.parameters())
    assert first == pytest.approx(start[0] - 0.1 - 0.15)
    assert second == pytest.approx(start[1] - 0.1)


def test_without_any_gradient_nothing_moves() -> None:
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    SGD(model, load_recipe("classic")).step(0.1)
    assert torch.equal(model.weight, before)


def test_training_does_not_load_the_compiler() -> None:
    program = """
import sys
import torch
from gammabeta.data import Dataset, Split
from gammabeta.train import build_network, fit, load_recipe
images = torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8).numpy()
split = Split(images, torch.arange(64).remainder(10).numpy())
dataset = Dataset("noise", split, split, tuple("0123456789"))
recipe = load_recipe("fast", {"epochs": 1, "batch_size": 32, "recalibrate": 64})
fit(build_network(recipe, dataset, 0), dataset, recipe, device="cpu")
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
