"""Whole networks: a training step before and after ``convert(to="fused")``, and the memory of one.

The networks are the public definitions of ``pytorchcv``, with random weights, at 224×224; a step is forward,
cross-entropy, backward and SGD with momentum. Converted or not, the weights are the same tensors.
"""

import multiprocessing
import statistics
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnavailableError
from ..surgery.convert import convert
from . import IncorrectError, Options, Result
from .timing import geometric_mean, interleave

NETWORKS = {"ResNet-18": "resnet18", "ResNet-50": "resnet50", "MobileNetV2": "mobilenetv2_w1"}
NETWORKS["DenseNet-121"] = "densenet121"
_BATCH = 8
_FLOOR = 1e-3


def _definition(name: str) -> nn.Module:
    try:
        get_model = import_module("pytorchcv.model_provider").get_model
    except ImportError as error:
        raise UnavailableError(
            f"the suite models needs pytorchcv ({error}): pip install --no-deps pytorchcv==0.0.67"
        ) from error
    model: nn.Module = get_model(NETWORKS[name], pretrained=False)
    return model


def _model(name: str, fused: bool) -> nn.Module:
    torch.manual_seed(0)
    model = _definition(name).train()
    return convert(model, "fused") if fused else model


class Step:
    """A network with its data and optimiser; calling it trains it for one step."""

    def __init__(
        self, name: str, fused: bool, *, batch: int = _BATCH, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model = _model(name, fused).to(dtype)
        torch.manual_seed(1)
        self.x = torch.randn(batch, 3, 224, 224).to(dtype)
        self.y = torch.randint(1000, (batch,))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)

    def __call__(self) -> Tensor:
        """One step; returns the loss before it."""
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def _check(name: str) -> None:
    """Raise ``IncorrectError`` unless the converted network's gradient is as true as the original's.

    The truth is the original's step in float64. A deep network with random weights magnifies rounding: the
    float32 gradient of ResNet-50 is off by more than a hundredth, with torch's own layers too. The floor is
    for single activations that rounding puts on the other side of zero, which change a gradient by a step.
    """
    truth = _gradient(Step(name, False, batch=2, dtype=torch.float64))
    before, after = (
        float((_gradient(Step(name, fused, batch=2)) - truth).norm() / truth.norm())
        for fused in (False, True)
    )
    if not after <= 2 * before + _FLOOR:
        raise IncorrectError(
            f"{name}: the gradient is off by {after:.2g} of its norm, before by {before:.2g}"
        )


def _gradient(step: Step) -> Tensor:
    step()
    return torch.cat([p.grad.double().flatten() for p in step.model.parameters() if p.grad is not None])


def _peak(name: str, fused: bool, sender: Any) -> None:
    """In a process of its own: MiB that a step needs at its peak beyond what is held before the first one."""
    step = Step(name, fused)
    held = _resident("VmRSS")
    step()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here
    step()
    sender.send(_resident("VmHWM") - held)


def _resident(which: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith(which + ":"))
    return int(line.split()[1]) / 1024


def peak_mebibytes(name: str, fused: bool) -> float | None:
    """Peak memory of a training step, measured in a fresh process; None where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return None
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(name, fused, sender))
    process.start()
    sender.close()
    found = float(receiver.recv())
    process.join()
    return found


def _usual_peak(name: str, fused: bool, processes: int) -> float | None:
    """The median over several processes: one differs from the next by a tenth."""
    found = [peak for _ in range(processes) if (peak := peak_mebibytes(name, fused)) is not None]
    return statistics.median(found) if found else None


def run(options: Options) -> Result:
    """Check every network's conversion, then time it."""
    rows: list[dict[str, Any]] = []
    for name in list(NETWORKS)[: 1 if options.quick else None]:
        _check(name)
        programs: dict[str, Callable[[], object]] = {
            "before": Step(name, False),
            "after": Step(name, True),
        }
        found = interleave(programs, rounds=3 if options.quick else 9, round_seconds=0)
        before, after = found["before"].median, found["after"].median
        rows.append(
            {
                "case": f"{name}, batch {_BATCH}",
                "before ms": before * 1e3,
                "after ms": after * 1e3,
                "times faster": before / after,
                "spread": (found["after"].upper - found["after"].lower) / after,
            }
        )
    memory = [_usual_peak("ResNet-18", fused, 1 if options.quick else 3) for fused in (False, True)]
    ratios = [row["times faster"] for row in rows]
    summary: dict[str, Any] = {
        "training step": f"geometric mean {geometric_mean(ratios):.2f}×, least {min(ratios):.2f}×"
    }
    if memory[0] and memory[1]:
        less = 100 * (1 - memory[1] / memory[0])
        summary["ResNet-18 step's peak memory"] = (
            f"{memory[0]:.0f} MiB before, {memory[1]:.0f} MiB after: {less:.0f} % less"
        )
    return Result("Training steps before and after convert(to='fused'), CPU", rows, summary)
