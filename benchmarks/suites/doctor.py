"""What recalibration and diagnosis cost beside a forward pass, after a check that recalibration is exact.

Precision and recall of the checks are another matter: ``python -m benchmarks.faults.bench``.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gammabeta.doctor import diagnose
from gammabeta.nn import BatchNorm1d, BatchNorm2d
from gammabeta.stats.recalibrate import recalibrate

from ..harness import IncorrectError, Options, Result
from ..harness.timing import interleave

IMAGES, BATCH = 4096, 512
ALLOWED = 1e-6  # relative error of means and variances at mean 1e4, standard deviation 1
SPLITS = ([777], [1, 776], [64] * 12 + [9], [1] * 777)


def network() -> nn.Module:
    """The notebook's shapes: two convolutions and a fully connected layer, each normalised."""
    model = nn.Sequential(
        nn.Conv2d(1, 20, 3, bias=False),
        BatchNorm2d(20, activation="relu", pool=2),
        nn.Conv2d(20, 50, 5, bias=False),
        BatchNorm2d(50, activation="relu", pool=2),
        nn.Flatten(),
        nn.Linear(800, 128, bias=False),
        BatchNorm1d(128, activation="relu"),
        nn.Linear(128, 10),
    )
    return nn.Module.to(model, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def inexactness() -> float:
    """Largest relative error against float64 over the whole set, for every split and both modes."""
    x = torch.randn(777, 8, 5, 5, generator=torch.Generator().manual_seed(0)) + 1e4
    mean, var = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3))
    worst = 0.0
    for split in SPLITS:
        layer = nn.BatchNorm2d(8)
        recalibrate(layer, x.split(split))
        worst = max(worst, _error(layer.running_mean, mean), _error(layer.running_var, var))
        layer.reset_running_stats()
        recalibrate(layer, x.split(split), mode="in-order")
        worst = max(worst, _error(layer.running_mean, mean), _error(layer.running_var, var))
    return worst


def _error(found: Tensor | None, exact: Tensor) -> float:
    assert found is not None
    return float(((found.double() - exact) / exact).abs().max())


def run(options: Options) -> Result:
    """Check, then time everything in interleaved rounds."""
    worst = inexactness()
    if worst > ALLOWED:
        raise IncorrectError(f"recalibration is off by {worst:.1e}, allowed are {ALLOWED:.0e}")
    images = IMAGES // 8 if options.quick else IMAGES
    model = network().eval()
    x = torch.rand(images, 1, 28, 28).contiguous(memory_format=torch.channels_last)
    loader = list(zip(x.split(BATCH), torch.randint(0, 10, (images,)).split(BATCH), strict=True))

    def forward() -> None:
        with torch.inference_mode():
            for part, _ in loader:
                model(part)

    programs: dict[str, Callable[[], object]] = {
        "forward in evaluation": forward,
        "recalibrate, joint": lambda: recalibrate(model, loader),
        "recalibrate, in order": lambda: recalibrate(model, loader, mode="in-order"),
        "diagnose, four modes": lambda: diagnose(model, loader, loss=nn.functional.cross_entropy),
    }
    timings = interleave(programs, rounds=3 if options.quick else 5)
    base = timings["forward in evaluation"].median
    rows = [
        {
            "case": name,
            "milliseconds": round(timing.median * 1e3, 1),
            "forward passes": round(timing.median / base, 2),
        }
        for name, timing in timings.items()
    ]
    notes = [f"{images} images of 28×28 in batches of {BATCH} through the notebook's network, channels_last."]
    return Result(
        "Recalibration and diagnosis", rows, {"largest relative error at mean 1e4": f"{worst:.1e}"}, notes
    )
