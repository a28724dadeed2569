"""Every case that ``gb.fold`` names: folded exactly, or left for a reason that is true.

    python benchmarks/fold_cases.py [--docs docs/fold.md]

Each case is a small model with random statistics and parameters. The tests run the same list.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.prune import l1_unstructured

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gammabeta as gb
from benchmarks.fold_case_models import (
    Decides,
    ForeignFrozen,
    Functional,
    NormAndActivation,
    PaddedConv,
    Pair,
    Renamed,
    Scale,
    also_returned,
    broken,
    flat_tokens,
    hooked,
    joined,
    no_shift,
    old_weight_norm,
    overflowing,
    randomised,
    residual,
    scripted,
    seq,
    shared,
    tied,
    turned_tokens,
    twice,
)
from benchmarks.harness.report import table, write_between


@dataclass(frozen=True)
class Case:
    """``outcomes``: of each batch norm, in order. ``reason``: words the report must say of one that stays."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    outcomes: tuple[str, ...] = ("folded",)
    reason: str = ""
    dtype: torch.dtype = torch.float32
    drawn: bool = True


LEFT = ("left",)
MAP = (2, 3, 9, 9)
WIDE = (2, 8, 9, 9)


def _convolutions() -> list[Case]:
    cases = []
    sizes = {1: (11,), 2: (9, 8), 3: (5, 6, 7)}
    for n, size in sizes.items():
        conv, transpose = getattr(nn, f"Conv{n}d"), getattr(nn, f"ConvTranspose{n}d")
        norm = getattr(nn, f"BatchNorm{n}d")

        def build(op: Any, norm: Any, groups: int, width: int, **options: Any) -> Callable[[], nn.Module]:
            return lambda: seq(op(8, width, 3, groups=groups, **options), norm(width))

        shape = (2, 8, *size)
        cases += [
            Case(f"after Conv{n}d", build(conv, norm, 1, 12, stride=2, padding=1), shape),
            Case(f"after Conv{n}d, groups", build(conv, norm, 4, 12, dilation=2), shape),
            Case(f"after Conv{n}d, depthwise", build(conv, norm, 8, 16, padding="same"), shape),
            Case(f"after ConvTranspose{n}d", build(transpose, norm, 1, 12, stride=2), shape),
            Case(
                f"after ConvTranspose{n}d, groups",
                build(transpose, norm, 4, 12, stride=2, output_padding=1),
                shape,
            ),
            Case(f"after ConvTranspose{n}d, depthwise", build(transpose, norm, 8, 16, padding=1), shape),
        ]
    return cases


def _after() -> list[Case]:
    def conv(**options: Any) -> nn.Module:
        return nn.Conv2d(3, 8, 3, **options)

    fused = gb.nn.BatchNorm2d
    return [
        Case("after Linear", lambda: seq(nn.Linear(6, 8), nn.BatchNorm1d(8)), (5, 6)),
        Case(
            "after Linear on (N, L, F), tokens flattened first",
            lambda: Pair(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), flat_tokens),
            (2, 5, 6),
        ),
        Case(
            "after Linear on (N, L, F), transposed first",
            lambda: Pair(nn.Linear(6, 8), nn.BatchNorm1d(8), turned_tokens),
            (2, 5, 6),
        ),
        Case("convolution with bias=False", lambda: seq(conv(bias=False), nn.BatchNorm2d(8)), MAP),
        Case("batch norm with affine=False", lambda: seq(conv(), nn.BatchNorm2d(8, affine=False)), MAP),
        Case("batch norm with bias=False", lambda: seq(conv(), fused(8, bias=False)), MAP),
        Case(
            "Linear and batch norm with affine=False",
            lambda: seq(nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False)),
            (5, 6),
        ),
        Case("subclass of BatchNorm2d", lambda: seq(conv(), Renamed(8)), MAP),
        Case("subclass with a forward of its own", lambda: seq(conv(), NormAndActivation(8)), MAP),
        Case(
            "convolution subclass with a forward of its own",
            lambda: seq(PaddedConv(3, 8, 3), nn.BatchNorm2d(8)),
            MAP,
        ),
        Case("SyncBatchNorm", lambda: seq(conv(), nn.SyncBatchNorm(8)), MAP),
        Case("gb FrozenBatchNorm2d", lambda: seq(conv(), gb.nn.FrozenBatchNorm2d(8)), MAP),
        Case("gb GhostBatchNorm2d", lambda: seq(conv(), gb.nn.GhostBatchNorm2d(8, 2)), MAP),
        Case("frozen batch norm of another library", lambda: seq(conv(), ForeignFrozen(8)), MAP),
        Case("functional F.batch_norm and F.conv2d", Functional, MAP),
        Case("fused module with activation", lambda: seq(conv(), fused(8, activation="silu")), MAP),
        Case(
            "fused module with activation and pool",
            lambda: seq(conv(), fused(8, activation="relu", pool=2)),
            MAP,
        ),
        Case(
            "fused module with activation and residual",
            lambda: Pair(nn.Conv2d(8, 8, 3, padding=1), fused(8, activation="relu"), residual),
            WIDE,
        ),
        Case("dropout between", lambda: seq(conv(), nn.Dropout(0.5), nn.BatchNorm2d(8)), MAP),
        Case("mean pooling between", lambda: seq(conv(), nn.AvgPool2d(2), nn.BatchNorm2d(8)), MAP),
        Case("float64", lambda: seq(conv(), nn.BatchNorm2d(8)).double(), MAP, dtype=torch.float64),
        Case(
            "bfloat16 convolution, float32 batch norm",
            lambda: seq(conv().bfloat16(), nn.BatchNorm2d(8)),
            MAP,
            dtype=torch.bfloat16,
        ),
        Case(
            "channels_last weights",
            lambda: seq(conv(), nn.BatchNorm2d(8)).to(memory_format=torch.channels_last),
            MAP,
        ),
    ]


def _before() -> list[Case]:
    norm = nn.BatchNorm2d
    return [
        Case("before Conv2d without padding", lambda: seq(norm(8), nn.Conv2d(8, 6, 3, stride=2)), WIDE),
        Case("before Conv2d, groups", lambda: seq(norm(8), nn.Conv2d(8, 6, 3, groups=2)), WIDE),
        Case(
            "before Conv2d, reflection padding",
            lambda: seq(norm(8), nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect")),
            WIDE,
        ),
        Case(
            "before Conv2d, circular padding",
            lambda: seq(norm(8), nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular")),
            WIDE,
        ),
        Case(
            "before Conv2d, zero padding, no shift",
            lambda: no_shift(norm(8, affine=False), nn.Conv2d(8, 6, 3, padding=1)),
            WIDE,
            drawn=False,
        ),
        Case("before Linear", lambda: seq(nn.BatchNorm1d(6), nn.Linear(6, 5)), (4, 6)),
        Case(
            "before Linear, flattened first", lambda: seq(norm(8), nn.Flatten(), nn.Linear(8 * 81, 5)), WIDE
        ),
        Case("before ConvTranspose2d 1x1", lambda: seq(norm(8), nn.ConvTranspose2d(8, 6, 1, groups=2)), WIDE),
        Case(
            "before ConvTranspose2d, no shift",
            lambda: no_shift(norm(8, affine=False), nn.ConvTranspose2d(8, 6, 3, stride=2)),
            WIDE,
            drawn=False,
        ),
        Case(
            "both sides of one convolution",
            lambda: seq(norm(8), nn.Conv2d(8, 6, 3), norm(6)),
            WIDE,
            ("folded",) * 2,
        ),
        Case(
            "BN-BN after a convolution",
            lambda: seq(nn.Conv2d(3, 8, 3), norm(8), norm(8)),
            MAP,
            ("folded",) * 2,
        ),
        Case(
            "BN-affine after a convolution",
            lambda: seq(nn.Conv2d(3, 8, 3), norm(8), Scale(8)),
            MAP,
            ("folded",) * 2,
        ),
        Case(
            "BN-BN alone", lambda: seq(norm(8), norm(8), nn.ReLU()), WIDE, ("merged", "left"), "model's input"
        ),
        Case("BN-affine alone", lambda: seq(norm(8), Scale(8), nn.ReLU()), WIDE, ("merged", "left"), "relu"),
        Case(
            "BN before a fused module",
            lambda: seq(norm(8), gb.nn.BatchNorm2d(8, activation="relu", pool=2)),
            WIDE,
            ("merged", "left"),
            "model's input",
        ),
    ]


def _left() -> list[Case]:
    norm, wide = nn.BatchNorm2d, nn.Conv2d

    def pair() -> nn.Module:
        return seq(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))

    return [
        Case(
            "zero padding after a shift",
            lambda: seq(norm(8), wide(8, 6, 3, padding=1)),
            WIDE,
            LEFT,
            "zero padding",
        ),
        Case(
            "ConvTranspose2d after a shift",
            lambda: seq(norm(8), nn.ConvTranspose2d(8, 6, 3, stride=2)),
            WIDE,
            LEFT,
            "borders",
        ),
        Case(
            "one convolution, two batch norms",
            lambda: Pair(wide(3, 8, 3), nn.ModuleList([norm(8), norm(8)]), shared),
            MAP,
            LEFT * 2,
            "used 2 times",
        ),
        Case(
            "convolution called twice",
            lambda: Pair(wide(3, 8, 3), norm(8), twice),
            MAP,
            LEFT,
            "called 2 times",
        ),
        Case("weight shared with another convolution", tied, WIDE, LEFT, "also used by"),
        Case(
            "output used elsewhere",
            lambda: Pair(wide(3, 8, 3), norm(8), also_returned),
            MAP,
            LEFT,
            "model's output",
        ),
        Case(
            "forward hook on the convolution", lambda: hooked(pair(), 0, "forward"), MAP, LEFT, "forward hook"
        ),
        Case("pre-hook on the convolution", lambda: hooked(pair(), 0, "pre"), MAP, LEFT, "pre-hook"),
        Case("hook on the weight", lambda: hooked(pair(), 0, "weight"), MAP, LEFT, "a hook on the weight"),
        Case("hook on the batch norm", lambda: hooked(pair(), 1, "forward"), MAP, LEFT, "forward hook"),
        Case(
            "parametrisation on the weight",
            lambda: seq(weight_norm(wide(3, 8, 3)), norm(8)),
            MAP,
            LEFT,
            "a parametrisation",
        ),
        Case(
            "weight made by a hook (weight_norm)",
            lambda: seq(old_weight_norm(wide(3, 8, 3)), norm(8)),
            MAP,
            LEFT,
            "pre-hook",
        ),
        Case(
            "pruned weight",
            lambda: seq(l1_unstructured(wide(3, 8, 3), "weight", 0.5), norm(8)),
            MAP,
            LEFT,
            "pre-hook",
        ),
        Case(
            "a ScriptModule between",
            lambda: seq(wide(3, 8, 3), scripted(), norm(8)),
            MAP,
            LEFT,
            "cannot be seen",
        ),
        Case(
            "Linear on (N, L, F), batch norm on L = F",
            lambda: seq(nn.Linear(6, 8), nn.BatchNorm1d(8)),
            (2, 8, 6),
            LEFT,
            "dimension 2",
        ),
        Case(
            "no running statistics",
            lambda: seq(wide(3, 8, 3), norm(8, track_running_stats=False)),
            MAP,
            LEFT,
            "no running statistics",
        ),
        Case(
            "activation between",
            lambda: seq(wide(3, 8, 3), nn.ReLU(), norm(8), nn.ReLU()),
            MAP,
            LEFT,
            "relu",
        ),
        Case("concatenation before", lambda: Pair(wide(8, 4, 1), norm(12), joined), WIDE, LEFT, "cat"),
        Case(
            "batch norm called twice",
            lambda: Pair(wide(8, 8, 1), norm(8), lambda conv, norm, x: norm(norm(conv(x)))),
            WIDE,
            LEFT * 2,
            "called 2 times",
        ),
        Case("another way on other data", Decides, MAP, LEFT, "another branch"),
        Case(
            "functional, in a forward torch.fx cannot trace",
            lambda: Functional(decide=True),
            MAP,
            ("taken back",),
            "cannot trace",
        ),
        Case("statistics that are not finite", broken, MAP, LEFT, "not finite", drawn=False),
        Case(
            "folded weight too large for float16",
            overflowing,
            MAP,
            ("taken back",),
            "does not fit",
            dtype=torch.float16,
            drawn=False,
        ),
    ]


CASES: list[Case] = [*_convolutions(), *_after(), *_before(), *_left()]


@dataclass(frozen=True)
class Result:
    """One case: what became of its layers, and the errors."""

    case: Case
    outcomes: tuple[str, ...]
    reasons: str
    error: float
    native_error: float


def run(case: Case) -> Result:
    """Build, fold, and tell."""
    torch.manual_seed(1)
    with torch.no_grad():
        model = case.build()
        if case.drawn:
            randomised(model)
    report = gb.fold(model.eval(), torch.randn(case.shape).to(case.dtype)).fold_report
    reasons = "; ".join(dict.fromkeys(layer.reason for layer in report.layers if layer.reason))
    error = max(report.error, report.random_error)
    return Result(case, tuple(layer.outcome for layer in report.layers), reasons, error, report.native_error)


def page(results: list[Result]) -> str:
    """Render as Markdown."""
    return table(
        [
            {
                "case": result.case.name,
                "outcome": ", ".join(result.outcomes),
                "relative error": f"{result.native_error:.0e}",
                "reason it stays": result.reasons,
            }
            for result in results
        ]
    )


def main() -> int:
    """Run every case; exit 1 if one is not as written."""
    parser = argparse.ArgumentParser(description="every case that fold names")
    parser.add_argument("--docs", type=Path, help="document whose table to replace")
    options = parser.parse_args()
    results = [run(case) for case in CASES]
    text = page(results).rstrip("\n")
    print(text)
    if options.docs:
        write_between(options.docs, "<!-- cases: begin -->", "<!-- cases: end -->", text)
    bad = [r for r in results if r.outcomes != r.case.outcomes or r.case.reason not in r.reasons]
    bad += [r for r in results if r.case.dtype == torch.float32 and not r.native_error <= 1e-6]
    for result in bad:
        print(f"NOT AS WRITTEN: {result}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
