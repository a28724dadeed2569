"""Wrong types at the doors: one line that names the function, the argument and what to give."""

import pytest
import torch
from torch import nn

import gammabeta as gb
from gammabeta.data import Preparation
from gammabeta.data.classify import Classifier

X = torch.randn(4, 3, 8, 8)


def model():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


WRONG = {
    "export_onnx: path is Tensor": lambda: gb.export_onnx(model(), X, "model.onnx"),
    "export_onnx: model is Tensor": lambda: gb.export_onnx(X, "model.onnx", model()),
    "fold: model is Tensor": lambda: gb.fold(X, model()),
    "convert: model is str": lambda: gb.convert("resnet18"),
    "convert: model is the class Conv2d": lambda: gb.convert(nn.Conv2d),
    "convert: to is Tensor": lambda: gb.convert(model(), X),
    "recalibrate: model is list": lambda: gb.recalibrate([X], model()),
    "recalibrate: loader is str": lambda: gb.recalibrate(model(), "mnist"),
    "recalibrate: loader is int": lambda: gb.recalibrate(model(), 3),
    "recalibrate: loader is ReLU": lambda: gb.recalibrate(model(), nn.ReLU()),
    "diagnose: model is list": lambda: gb.diagnose([X], model()),
    "diagnose: loader is the class list": lambda: gb.diagnose(model(), list),
    "adapt: loader is int": lambda: gb.adapt(model(), 3),
    "update_bn: model is list": lambda: gb.update_bn(model(), [X]),
    "domains: model is str": lambda: gb.domains("resnet18"),
    "distil: old is str": lambda: gb.distil(model(), "resnet18", [X]),
    "benchmark: model is Tensor": lambda: gb.benchmark(X, model()),
    "watch: model is SGD": lambda: gb.watch(torch.optim.SGD(model().parameters(), 0.1), model()),
    "watch: optimizer is Sequential": lambda: gb.watch(model(), model()),
    "fit: model is str": lambda: gb.fit("resnet18", "mnist"),
    "load: path is int": lambda: gb.load(3),
    "predict: run is Sequential": lambda: gb.predict(model(), X),
}


@pytest.mark.parametrize("message", WRONG)
def test_refused_by_name(message):
    with pytest.raises(gb.errors.UsageError) as refused:
        WRONG[message]()
    assert str(refused.value).startswith(f"{message}; give ")
    assert "\n" not in str(refused.value)


def test_what_can_be_gone_through_is_not_refused():
    class Indexed:
        def __getitem__(self, number):
            return [X][number]

    gb.recalibrate(model(), Indexed())
    gb.recalibrate(model(), X[None])  # a stack of batches


@pytest.mark.parametrize(
    ("given", "message"),
    [((3,), "predict: pictures is int; give "), ((None,), "predict: pictures is NoneType; give "),
     ((X[0].numpy(), 0), "predict: top is the number of classes to name, at least 1, not 0")],
)  # fmt: skip
def test_predict_refuses_what_is_no_picture(given, message):
    classifier = Classifier(["a", "b"], Preparation(1, 8, 8), lambda pixels: pixels, 1.0)
    with pytest.raises(gb.errors.UsageError) as refused:
        classifier.predict(*given)
    assert str(refused.value).startswith(message)
