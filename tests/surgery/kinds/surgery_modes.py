"""Surgery done in another mode: inference mode, no gradients, autocast, another default dtype."""

import contextlib

import torch
from torch import nn

from .base import IMAGE, OTHER, Block
from .harness import call, kind, x


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block(3, 4))
        self.fc = nn.Linear(4, 2)
        self.bn = nn.BatchNorm1d(2)

    def forward(self, x):
        return self.bn(self.fc(self.blocks(x).mean((2, 3)))).relu()


ALL = ("convert", "fold", "recalibrate")


@kind(call(IMAGE), call(OTHER), around=torch.inference_mode, must=ALL)
class InInferenceMode(Network):
    pass


@kind(call(IMAGE), call(OTHER), around=torch.no_grad, must=ALL)
class InNoGrad(Network):
    pass


@kind(call(IMAGE), call(OTHER), around=lambda: torch.autocast("cpu", torch.bfloat16), must=("convert",))
class InAutocast(Network):
    pass


@contextlib.contextmanager
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@kind(call(IMAGE), call(OTHER), around=_float64, must=ALL)
class InDefaultFloat64(Network):
    pass


@contextlib.contextmanager
def _deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@kind(call(IMAGE), call(OTHER), around=_deterministic, must=ALL)
class InDeterministicMode(Network):
    pass


@contextlib.contextmanager
def _meta():
    with torch.device("meta"):
        yield


@kind(call(IMAGE), call(OTHER), around=_meta, must=("convert",))
class UnderAnotherDefaultDevice(Network):
    pass


@kind(call(IMAGE), call(OTHER), around=lambda: torch.autograd.set_detect_anomaly(True), must=ALL)
class WithAnomalyDetection(Network):
    pass


@kind(call(IMAGE), call(OTHER), must=ALL)
def in_evaluation_already():
    return Network().eval()


@kind(call(IMAGE), call(OTHER), must=("convert", "fold"), never=("recalibrate",))
def mixed_modes():
    network = Network()
    network.blocks[0].eval()
    network.bn.eval()
    return network


@kind(call(IMAGE), call(OTHER), must=ALL)
def some_frozen():
    network = Network()
    network.blocks[0].requires_grad_(False)
    return network


@kind(call(IMAGE), call(x(1, 3, 6, 6)), must=ALL)
def example_may_be_one_sample():
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())


@kind(call(x(1, 3, 1, 1)), call(IMAGE), must=("convert", "fold"), never=("recalibrate",), modes=(False,))
def example_of_one_value():
    """In training a batch norm cannot take the example."""
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
