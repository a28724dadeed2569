"""The guard: faults noticed and after how many steps, alarms over healthy trainings, cost of a step.

``--part faults|healthy|cost`` runs one of the three; ``--seeds`` how many of each.
"""

import argparse
import math
import time
import warnings
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gammabeta.guard import Guard, watch

from ..guard.trainings import FAULTS, HEALTHY
from ..harness import IncorrectError, Options, Result
from .doctor import network

PARTS = ("faults", "healthy", "cost")
WITHIN = 50  # steps


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which part, and how many seeds."""
    parser.add_argument("--part", choices=PARTS, help="one part only")
    parser.add_argument("--seeds", type=int, default=5, help="of each training; %(default)s")


def run(options: Options) -> Result:
    """Train everything, count, time."""
    seeds = 1 if options.quick else options.given.seeds
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for part in [options.given.part] if options.given.part else PARTS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, told = {"faults": _faults, "healthy": _healthy, "cost": _cost}[part](seeds)
        rows += found
        summary |= told
    return Result("The guard", rows, summary, part=options.given.part or "")


def _faults(seeds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = []
    for name, fault in FAULTS.items():
        steps: list[float] = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            noticed = fault.make().run()
            hits = [n.step - fault.begins for n in noticed if n.finding.check in fault.codes]
            steps.append(min(hits, default=math.inf))
        rows.append(_row("fault: " + name, "steps until noticed, median", median(steps), seeds))
    within = sum(row["value"] <= WITHIN for row in rows)
    return rows, {f"faults noticed within {WITHIN} steps (median)": f"{within} of {len(rows)}"}


def _healthy(seeds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows, told = [], []
    for name, make in HEALTHY.items():
        alarms = 0
        for seed in range(seeds):
            torch.manual_seed(100 + seed)
            noticed = make().run()
            told += [f"{name}: {one}" for one in noticed]
            alarms += bool(noticed)
        rows.append(_row("healthy: " + name, "trainings with an alarm", alarms, seeds))
    summary: dict[str, Any] = {"alarms over healthy trainings": f"{len(told)} in {seeds * len(HEALTHY)}"}
    return rows, summary | ({"told": "; ".join(told)} if told else {})


def _row(case: str, what: str, value: float, seeds: int) -> dict[str, Any]:
    return {"case": case, "what": what, "value": value, "seeds": seeds}


class _Block(nn.Module):
    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(into, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.short: nn.Module = nn.Identity()
        if stride > 1 or into != out:
            self.short = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.short(x))


def resnet18() -> nn.Module:
    """ResNet-18 as published, with its 20 batch norms."""
    widths = ((64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1))
    widths += ((128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1))
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        *(_Block(*width) for width in widths),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, 1000),
    )


def _cost(seeds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Seconds that the guard spends in a training of 500 steps, beside those of the steps.

    The guard's own seconds are summed, its start included: the difference of two trainings would drown in the
    noise of the machine.
    """
    cases = {
        "digit network, 64×1×28×28": (network(), (64, 1, 28, 28), 10),
        "ResNet-18, 4×3×224×224": (resnet18(), (4, 3, 224, 224), 1000),
    }
    rows = []
    for name, (model, shape, classes) in cases.items():
        x, y = torch.rand(shape), torch.randint(0, classes, shape[:1])
        _same_bits(model, x, y)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        step = median(_step(model, optimizer, x, y) for _ in range(3))
        spent = _Spent()
        guard = spent.watched(model, optimizer)
        for _ in range(64):  # the steps that are looked at closely
            _step(model, optimizer, x, y)
        close, spent.seconds = spent.seconds, 0.0
        for _ in range(32):  # the others: one sparse pair
            _step(model, optimizer, x, y)
        guard.close()
        share = (close + spent.seconds / 32 * (500 - 64)) / (500 * step)
        rows.append(_row(name, "share of 500 steps", round(share, 5), 1))
    return rows, {"largest share of a step": f"{max(row['value'] for row in rows):.2%}"}


def _step(model: nn.Module, optimizer: Any, x: torch.Tensor, y: torch.Tensor) -> float:
    began = time.process_time()
    optimizer.zero_grad()
    torch.autograd.backward(F.cross_entropy(model(x), y))
    optimizer.step()
    return time.process_time() - began


class _Spent:
    """Processor seconds in the guard's two entries."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watched(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Guard:
        spent = self

        class Timed(Guard):
            def _advance(self) -> None:
                began = time.process_time()
                super()._advance()
                spent.seconds += time.process_time() - began

            def _entered(self, *given: Any) -> None:
                began = time.process_time()
                super()._entered(*given)
                spent.seconds += time.process_time() - began

        guard = watch(model, optimizer)
        guard.close()
        began = time.process_time()
        timed = Timed(model, optimizer, lambda noticed: None, None, None, False)
        spent.seconds += time.process_time() - began
        return timed


def _same_bits(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """Raise unless three steps with the guard give the very bits of three without."""
    start = {name: value.clone() for name, value in model.state_dict().items()}
    ends = []
    for guarded in (False, True):
        model.load_state_dict(start)
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        guard = watch(model, optimizer, tell=lambda noticed: None) if guarded else None
        for _ in range(3):
            _step(model, optimizer, x, y)
        if guard is not None:
            guard.close()
        ends.append({name: value.clone() for name, value in model.state_dict().items()})
    if not all(torch.equal(ends[0][name], ends[1][name]) for name in start):
        raise IncorrectError("the guard changed a training")
