"""Whole trainings on a GPU: a ResNet-50 step before and after ``convert``, and the digit network's time."""

import copy
import statistics
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gammabeta.conversion.convert import convert

from ..harness import IncorrectError, command
from .gpu_timing import interleave

_LOSS_TOLERANCE = 2e-2  # of losses after one bf16 step of the same network from the same start
_TARGET = 0.989
_TIMEOUT = 900.0  # seconds for one training, the first compiles its kernels
_NEEDED = ("typer", "pydantic", "rich", "safetensors", "matplotlib")


class Bottleneck(nn.Module):
    """He et al. 2015, figure 5, right; the stride in the 3x3 convolution."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        outside = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outside, 1, bias=False), nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, 4 width, H / stride, W / stride)``."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += self.shortcut(x)
        out: Tensor = self.relu(y)
        return out


def resnet50(blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> nn.Sequential:
    """ResNet-50 from its paper's table 1; fewer ``blocks`` or less ``width`` for a test."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]
    inside = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            stride = 2 if stage and not block else 1
            layers.append(Bottleneck(inside, width << stage, stride))
            inside = 4 * (width << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, classes))


def training_step(model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """One step of SGD with momentum in bf16 autocast, as a call that returns the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def resnet_step(device: torch.device, batch: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a ResNet-50 step, bf16 autocast, channels_last, before and after ``convert``.

    Raises:
        IncorrectError: the converted model's losses are not the original's.
    """
    torch.manual_seed(0)
    x = torch.randn(batch, 3, 224, 224, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,), device=device)
    original: nn.Module = resnet50().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    fused = convert(copy.deepcopy(original), to="fused")
    models: dict[str, Any] = {"eager": original, "eager, converted": fused}
    for name, model in tuple(models.items()):
        models[name.replace("eager", "compiled")] = torch.compile(copy.deepcopy(model))
    steps = {name: training_step(model, x, labels) for name, model in models.items()}
    losses = {name: [float(step()) for _ in range(3)] for name, step in steps.items()}
    for name, run in losses.items():
        for mine, theirs in zip(run, losses["eager"], strict=True):
            if not abs(mine - theirs) <= _LOSS_TOLERANCE * abs(theirs):
                raise IncorrectError(f"ResNet-50, {name}: loss {mine:.4f}, the original's {theirs:.4f}")
    times = interleave({name: [step] for name, step in steps.items()}, rounds, graphs=False)
    found = {f"ResNet-50 step, batch {batch}, {name}": f"{ms:.1f} ms" for name, ms in times.items()}
    for name in ("eager", "compiled"):
        found[f"ResNet-50 converted, {name}"] = f"{times[name] / times[f'{name}, converted']:.3f}× as fast"
    return found


def digits(seeds: int) -> dict[str, Any]:
    """Seconds of training and test accuracy of ``gammabeta train`` with the recipe ``fast``, over seeds."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        return {"digit network": f"left out: {', '.join(missing)} not installed (pip install .)"}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(-1, seeds):  # the first warms the caches of compiled kernels and does not count
            options = ["--recipe", "fast", "--device", "cuda", "--seed", str(max(0, seed))]
            run = command.train([*options, "--out", str(Path(folder) / str(seed))], _TIMEOUT)
            if seed >= 0:
                found.append(run.result)
    seconds = [run["seconds"]["train"] + run["seconds"]["recalibrate"] for run in found]
    accuracy = [run["test_accuracy"] for run in found]
    reached = sum(a >= _TARGET for a in accuracy)
    middle, most = statistics.median(seconds), max(seconds)
    return {
        "digit network, seconds of training": f"median {middle:.2f}, most {most:.2f}",
        "digit network, test accuracy": f"median {statistics.median(accuracy):.4f}, "
        f"{reached} of {seeds} seeds reach {_TARGET}",
    }
