"""Models of other libraries: surgery is right, and reaches them.

``benchmarks/run.py surgery`` has the figures.
"""

import functools

import pytest

from benchmarks.foreign.measure import OPERATIONS, measure
from benchmarks.foreign.models import TIMM, everything
from benchmarks.foreign.stub import import_timm
from gammabeta.conversion.next_use import OTHER_CODE

pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's code

MODELS = everything()
SMALL = (
    "timm test_byobnet",
    "timm test_efficientnet",
    "timm test_resnet",
    "timm mobilenetv3_small_050",
    "pytorchcv diaresnet20_cifar10",
    "pytorchcv resnet20_cifar10",
)
MORE = (
    "timm dla46x_c",
    "timm ese_vovnet19b_slim_dw",
    "timm lcnet_035",
    "timm regnetx_002",
    "timm starnet_s050",
    "pytorchcv preresnet20_cifar10",
)


@functools.cache
def library(name):
    """Why the library of a model cannot be used; empty if it can."""
    try:
        import_timm() if name == "timm" else pytest.importorskip(name)
    except (ImportError, pytest.skip.Exception) as error:
        return f"{name} is not installed: {error}"
    return ""


def measured(name):
    why = library(name.split()[0])
    if why:
        pytest.skip(why)
    row = measure(MODELS[name])
    assert "skipped" not in row
    wrong = {op: row[op].get("why") for op in OPERATIONS if row[op]["outcome"] != "ok"}
    assert not wrong
    return row


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_small_models_are_right_and_reached(name):
    row = measured(name)
    for operation in ("convert", "convert with example"):
        assert row[operation]["ours"] == row["norms"], row[operation]["left"]
    fused, reasons = row["convert with example"]["fused"], row["convert with example"]["reasons"]
    parted = sum(OTHER_CODE in reason for reason in reasons.values())
    assert fused + parted >= 0.85 * row["activations"], reasons


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [name for name in MODELS if name not in SMALL + MORE])
def test_every_model_is_right(name):
    measured(name)


def test_the_list_of_timm_is_long_and_exists():
    names = [name for names in TIMM.values() for name in names.split()]
    assert len(names) == len(set(names)) >= 150
    if library("timm"):
        pytest.skip(library("timm"))
    assert set(names) <= set(import_timm().list_models())
