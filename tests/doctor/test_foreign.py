"""Foreign models, made healthy on the data that they are diagnosed with: no error, no warning."""

import contextlib
import warnings

import pytest
import torch
from torch import Tensor, nn

import gammabeta as gb
from gammabeta.doctor.samples import take
from gammabeta.errors import SurgeryError

pytestmark = pytest.mark.slow

models = pytest.importorskip("benchmarks.foreign.models", reason="the table of foreign models is not there")
BATCH, FEW_VALUES = 16, 64
# Random weights may leave a tenth of a layer's channels dead, which is true.
OF_RANDOM_WEIGHTS = {"collapsed-variance", "dead-input"}
LARGEST = 12_000_000  # parameters


def forward(model: nn.Module, batch):
    return model(**batch) if isinstance(batch, dict) else model(*batch)


def enliven(model: nn.Module) -> None:
    """Draw γ and β; random weights leave some at zero, which the doctor rightly names."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.affine:
            with torch.no_grad():
                layer.weight.copy_(torch.rand(layer.weight.shape, generator=generator) + 0.5)
                layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator) * 0.2)


def healthy(foreign, size: int):
    """The model and its data; None where it does not run on this size."""
    torch.manual_seed(0)
    model = foreign.build()
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        pytest.skip("too large for this test")
    enliven(model)
    # The same samples in another order: batch statistics are then exact, so one pass gives all layers theirs.
    batch = foreign.inputs(BATCH, size, 0)
    loader = [batch, take(batch, torch.arange(BATCH).flip(0), BATCH)]
    with contextlib.suppress(SurgeryError):
        gb.recalibrate(model, loader, forward_fn=forward)
    for layer in model.modules():
        counter = getattr(layer, "num_batches_tracked", None)
        if isinstance(counter, Tensor) and int(counter):
            counter.fill_(1000)
    return model.eval(), loader


def of_few_values(finding, report) -> bool:
    """Whether it is true: n values have (n - 1)/n of the variance, and deep models multiply that."""
    sizes = [size.values for a in report.evidence.activity.values() for size in a.sizes]
    noise = finding.check == "train-eval-gap" and finding.values["part"] == "noise"
    return noise and min(sizes) <= FEW_VALUES


@pytest.mark.parametrize("name", sorted(models.everything()))
def test_foreign_model(name):
    foreign = models.everything()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other people's code
        for size in foreign.sizes:
            try:
                model, loader = healthy(foreign, size)
            except ImportError as error:
                pytest.skip(str(error))
            except (RuntimeError, ValueError, AssertionError):  # their own checks of sizes
                continue
            report = gb.diagnose(model, loader, forward_fn=forward)
            found = [f for f in report.at_least("warning") if f.check not in OF_RANDOM_WEIGHTS]
            assert [f for f in found if not of_few_values(f, report)] == [], str(report)
            return
    pytest.skip("runs on none of the sizes")
