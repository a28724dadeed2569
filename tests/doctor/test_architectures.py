"""The doctor on public architectures: it runs, examines all, changes nothing, and recalibration satisfies it.

Needs three packages without their dependencies (none of them needs torchvision for this)::

    pip install --no-deps pytorchcv monai efficientnet-pytorch
    pytest -m slow tests/doctor/test_architectures.py
"""

import importlib
import warnings

import pytest
import torch
from torch import nn

import gammabeta as gb

pytestmark = pytest.mark.slow

CLASSIFIERS = {
    "resnet18": "resnet",
    "preresnet18": "preresnet",
    "resnext26_32x4d": "resnext",
    "seresnet18": "seresnet",
    "densenet121": "densenet",
    "bn_vgg11": "vgg",
    "mobilenet_w1": "mobilenet",
    "mobilenetv2_w1": "mobilenetv2",
    "mobilenetv3_small_w1": "mobilenetv3",
    "shufflenetv2_wd2": "shufflenetv2",
    "squeezenet_v1_1": "squeezenet",
    "inceptionv3": "inceptionv3",
    "ghostnet": "ghostnet",
}


def pytorchcv(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """The model's own module: the package's index of all models wants torchvision."""
    pytest.importorskip("pytorchcv")
    module = importlib.import_module(f"pytorchcv.models.{CLASSIFIERS[name]}")
    size = 299 if name == "inceptionv3" else 224
    return getattr(module, name)(), (3, size, size)


def efficientnet() -> tuple[nn.Module, tuple[int, ...]]:
    package = pytest.importorskip("efficientnet_pytorch")
    return package.EfficientNet.from_name("efficientnet-b0"), (3, 64, 64)


def monai(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    pytest.importorskip("monai")
    nets = importlib.import_module("monai.networks.nets")
    if name == "UNet":
        settings = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "norm": "batch"}
        return nets.UNet(channels=(4, 8, 16), strides=(2, 2), **settings), (1, 16, 16, 16)
    if name == "DenseNet121":
        return nets.DenseNet121(spatial_dims=2, in_channels=1, out_channels=2), (1, 64, 64)
    return nets.SegResNet(spatial_dims=3, init_filters=8, norm="batch"), (1, 16, 16, 16)


MODELS = [pytest.param(pytorchcv, name, id=f"pytorchcv-{name}") for name in CLASSIFIERS]
MODELS += [pytest.param(monai, name, id=f"monai-{name}") for name in ("UNet", "DenseNet121", "SegResNet")]
MODELS += [pytest.param(lambda _: efficientnet(), "b0", id="efficientnet_pytorch-b0")]


def fingerprint(model: nn.Module) -> list[bytes]:
    return [value.numpy().tobytes() for value in model.state_dict().values()]


@pytest.mark.parametrize(("build", "name"), MODELS)
def test_public_architecture(build, name):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of these packages' imports
        model, shape = build(name)
    loader = [torch.randn(4, *shape) for _ in range(2)]
    before = fingerprint(model)
    fresh = gb.diagnose(model, loader)
    assert fingerprint(model) == before
    assert fresh.evidence.not_examined == []
    layers = [layer.name for layer in fresh.evidence.layers]
    ill = {finding.layer for finding in fresh if finding.check == "never-updated"}
    assert ill == set(layers)
    if not layers:
        return
    gb.recalibrate(model, loader, mode="joint")
    mended = gb.diagnose(model.eval(), loader)
    # Four images of noise in a batch are few, and say so; the finding is about the batches.
    allowed = {"tiny-batch", "train-eval-gap", "dropout-before-bn", "dead-input", "collapsed-variance"}
    assert {finding.check for finding in mended.at_least("warning")} <= allowed, str(mended)
