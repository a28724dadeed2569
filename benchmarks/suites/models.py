"""Whole networks: a training step before and after ``convert(to="fused")``, and the memory of one.

After it in two ways: as it is by default, and with ``recompute=True``.

The networks are the public definitions of ``pytorchcv`` and, where it is installed, of ``timm``, with random
weights, at 224×224; a step is forward, cross-entropy, backward and SGD with momentum. Converted or not, the
weights are the same tensors. ``without norms`` says how many times faster the network would be with nothing
in the place of its batch norms, activations kept. Measured too is what it costs a rewritten ``forward`` to
let a call wait.
"""

import argparse
import ctypes
import multiprocessing
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gammabeta.conversion.convert import convert
from gammabeta.errors import UnavailableError
from gammabeta.kernels.cpu import allocator

from ..foreign.stub import import_timm
from ..harness import IncorrectError, Options, Result, machine, report
from ..harness.timing import interleave

NETWORKS = {"ResNet-18": "resnet18", "ResNet-50": "resnet50", "MobileNetV2": "mobilenetv2_w1"}
NETWORKS["DenseNet-121"] = "densenet121"
TIMM = {
    "MobileNetV3-Large, timm": "mobilenetv3_large_100",
    "EfficientNet-B0, timm": "efficientnet_b0",
    "RegNetY-004, timm": "regnety_004",
    "ResNet-50, timm": "resnet50",
    "DenseNet-121, timm": "densenet121",
}
_BATCH = 8
_FLOOR = 1e-3
VARIANTS = ("before", "after", "recompute")
WITHOUT = "without"  # any batch norm, the activations kept: what a free one would leave


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the suite's options."""
    parser.add_argument(
        "--only",
        nargs="+",
        choices=(*NETWORKS, *TIMM),
        metavar="NETWORK",
        help=f"of {', '.join((*NETWORKS, *TIMM))}; rows of others are kept from the results there are",
    )


def _without_timm() -> str:
    """Why timm's networks are left out; empty if they are not."""
    try:
        import_timm()
    except ImportError as error:
        return f"timm cannot be imported ({error}): pip install --no-deps timm==1.0.31"
    return ""


def _definition(name: str) -> nn.Module:
    if name in TIMM:
        made: nn.Module = import_timm().create_model(TIMM[name])
        return made
    try:
        get_model = import_module("pytorchcv.model_provider").get_model
    except ImportError as error:
        raise UnavailableError(
            f"the suite models needs pytorchcv ({error}): pip install --no-deps pytorchcv==0.0.67"
        ) from error
    model: nn.Module = get_model(NETWORKS[name], pretrained=False)
    return model


def _model(name: str, variant: str) -> nn.Module:
    torch.manual_seed(0)
    model = _definition(name).train()
    if variant == WITHOUT:
        return _without_norms(model)
    return model if variant == "before" else convert(model, "fused", recompute=variant == "recompute")


def _without_norms(model: nn.Module) -> nn.Module:
    """The model with each batch norm replaced by its own activation, or by nothing; for its time alone."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(module, name, getattr(child, "act", nn.Identity()))
    return model


class Step:
    """A network with its data and optimiser; calling it trains it for one step."""

    def __init__(
        self, name: str, variant: str, *, batch: int = _BATCH, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model = _model(name, variant).to(dtype)
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
    """Raise ``IncorrectError`` unless the converted networks' gradient is as true as the original's.

    The truth is the original's step in float64. A deep network with random weights magnifies rounding: the
    float32 gradient of ResNet-50 is off by more than a hundredth, with torch's own layers too. The floor is
    for single activations that rounding puts on the other side of zero, which change a gradient by a step.
    """
    truth = _gradient(Step(name, "before", batch=2, dtype=torch.float64))
    before, *others = (
        float((_gradient(Step(name, variant, batch=2)) - truth).norm() / truth.norm()) for variant in VARIANTS
    )
    for after in others:
        if not after <= 2 * before + _FLOOR:
            raise IncorrectError(
                f"{name}: the gradient is off by {after:.2g} of its norm, before by {before:.2g}"
            )


def _gradient(step: Step) -> Tensor:
    step()
    return torch.cat([p.grad.double().flatten() for p in step.model.parameters() if p.grad is not None])


class Memory(NamedTuple):
    """MiB of resident memory, from ``/proc``."""

    step: float  # what a step needs at its peak beyond what is held between steps
    process: float  # the same beyond what was held before the first step: code, kernels, momentum too


def _measure(name: str, variant: str, sender: Any) -> None:
    """In a process of its own; between the steps the C library and our pool give free memory back."""
    step = Step(name, variant)
    before = _resident("VmRSS")
    step()
    step()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
    allocator.release()
    held = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here
    for _ in range(3):
        step()
    peak = _resident("VmHWM")
    sender.send(Memory(peak - held, peak - before))


def _resident(which: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith(which + ":"))
    return int(line.split()[1]) / 1024


def memory_of(name: str, variant: str) -> Memory | None:
    """Memory of a training step, measured in a fresh process; None where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return None
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(name, variant, sender))
    process.start()
    sender.close()
    found: Memory = receiver.recv()
    process.join()
    return found


def _usual_memory(name: str, variant: str, processes: int) -> Memory | None:
    """The medians over several processes: one differs from the next by a tenth."""
    found = [memory for _ in range(processes) if (memory := memory_of(name, variant)) is not None]
    return Memory(*(median(column) for column in zip(*found, strict=True))) if found else None


def _memory_summary(name: str, processes: int) -> dict[str, str]:
    before, *others = (_usual_memory(name, variant, processes) for variant in VARIANTS)
    summary = {}
    for variant, after in zip(VARIANTS[1:], others, strict=True):
        if before is not None and after is not None:
            less = [100 * (1 - a / b) for a, b in zip(after, before, strict=True)]
            summary[f"{name} step's peak memory, {variant}"] = (
                f"{before.step:.0f} MiB before, {after.step:.0f} MiB after: {less[0]:.0f} % less; with all "
                f"that came with the first step {before.process:.0f} and {after.process:.0f} MiB: "
                f"{less[1]:.0f} % less"
            )
    return summary


class _Two(nn.Module):
    """A batch norm and a ReLU, as a model calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(16), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        out: Tensor = self.relu(self.bn(x))
        return out


class _Direct(_Two):
    """The same in one call of our layer."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        out: Tensor = self.bn(x, activation="relu")
        return out


def guards() -> dict[str, float]:
    """Seconds of a call of ``_Two`` converted, and of ``_Direct``, whose layer is told what follows it."""
    direct = _Direct()
    direct.bn = convert(direct.bn)
    models = {"rewritten": convert(_Two()), "told": direct}
    x = torch.randn(2, 16, 4, 4)
    programs = {name: partial(model.eval(), x) for name, model in models.items()}
    with torch.no_grad():
        found = interleave(programs, rounds=401, round_seconds=0.0005)
    return {name: timing.median for name, timing in found.items()}


def _row(name: str, rounds: int) -> dict[str, Any]:
    _check(name)
    variants = (*VARIANTS, WITHOUT)
    programs: dict[str, Callable[[], object]] = {variant: Step(name, variant) for variant in variants}
    found = interleave(programs, rounds=rounds, round_seconds=0)
    before, after, recompute, without = (found[variant].median for variant in variants)
    return {
        "case": f"{name}, batch {_BATCH}",
        "before ms": before * 1e3,
        "after ms": after * 1e3,
        "times faster": before / after,
        "without norms": before / without,
        "recompute ms": recompute * 1e3,
        "times faster, recompute": before / recompute,
        "spread": (found["after"].upper - found["after"].lower) / after,
        "commit": machine.commit(Path(__file__).parent),
    }


def run(options: Options) -> Result:
    """Check every network's conversion, then time it."""
    missing = _without_timm()
    names = [*NETWORKS, *(() if missing else TIMM)]
    only = vars(options.given).get("only") or names[: 1 if options.quick else None]
    stem = report.stem_of("models", options.quick)
    measured = {row["case"]: row for row in report.measured(stem, options.out)}
    for name in only:
        row = _row(name, 3 if options.quick else 9)
        measured[row["case"]] = row
    cases = [f"{name}, batch {_BATCH}" for name in (*NETWORKS, *TIMM)]
    rows = [measured[case] for case in cases if case in measured]
    ratios = [row["times faster"] for row in rows]
    slower = [row["times faster, recompute"] for row in rows]
    at_most = [row["without norms"] for row in rows if "without norms" in row]
    summary: dict[str, Any] = {
        "training step": f"geometric mean {geometric_mean(ratios):.2f}×, least {min(ratios):.2f}×",
        "with recompute=True": f"geometric mean {geometric_mean(slower):.2f}×, least {min(slower):.2f}×",
    }
    if at_most:
        bound = f"geometric mean {geometric_mean(at_most):.2f}×, least {min(at_most):.2f}×"
        summary["without any batch norm"] = bound
    cost = guards()
    summary["a batch norm and a ReLU on (2, 16, 4, 4), in evaluation"] = (
        f"{cost['rewritten'] * 1e6:.1f} µs in a rewritten forward, {cost['told'] * 1e6:.1f} µs in one call "
        f"of our layer: {(cost['rewritten'] - cost['told']) * 1e6:.1f} µs for the guards"
    )
    if "ResNet-18" in only:
        summary |= _memory_summary("ResNet-18", 1 if options.quick else 3)
    if missing and not options.quick:
        summary["left out"] = f"{', '.join(TIMM)}: {missing}"
    title = "Training steps before and after convert(to='fused'), CPU"
    return Result(title, rows, summary, measured=rows)
