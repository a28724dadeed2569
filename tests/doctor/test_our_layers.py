"""Every kind of layer that PyTorch and we have: recalibrated it is healthy, and a fault is found."""

import pytest
import torch
from torch import nn

import gammabeta as gb

LAYERS = {
    "torch": lambda: nn.BatchNorm2d(4),
    "torch-sync": lambda: nn.SyncBatchNorm(4),
    "torch-lazy": lambda: nn.LazyBatchNorm2d(),
    "ours": lambda: gb.nn.BatchNorm2d(4),
    "ours-relu-pool": lambda: gb.nn.BatchNorm2d(4, activation="relu", pool=2),
    "ours-ghost": lambda: gb.nn.GhostBatchNorm2d(4, virtual_batch_size=16),
    "ours-lazy": lambda: gb.nn.LazyBatchNorm2d(),
    "no-affine": lambda: nn.BatchNorm2d(4, affine=False),
    "cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
}


def model_and_loader(layer: nn.Module) -> tuple[nn.Module, list[torch.Tensor]]:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), layer)
    loader = [torch.randn(32, 1, 10, 10) * 3 + 1 for _ in range(5)]
    with torch.no_grad():
        model.eval()(loader[0])
    return model, loader


@pytest.mark.parametrize("kind", LAYERS)
def test_recalibrated_is_healthy_and_stale_is_not(kind):
    model, loader = model_and_loader(LAYERS[kind]())
    gb.recalibrate(model, loader)
    report = gb.diagnose(model, loader)
    assert report.healthy, str(report)
    assert report.evidence.not_examined == []
    model[1].running_mean += 2 * model[1].running_var.sqrt()
    found = {finding.check for finding in gb.diagnose(model, loader).at_least("warning")}
    assert found == {"statistics-drift", "train-eval-gap"}


def test_our_relu_is_known_to_follow():
    model, loader = model_and_loader(gb.nn.BatchNorm2d(4, activation="relu"))
    assert gb.diagnose(model, loader).evidence.surroundings["1"].relu_after


def test_our_layers_skip_the_second_update_of_a_recomputation():
    from torch.utils.checkpoint import checkpoint

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = gb.nn.BatchNorm2d(4)

        def forward(self, x):
            return checkpoint(self.norm, x, use_reentrant=False) if self.training else self.norm(x)

    report = gb.diagnose(Net(), example=torch.randn(8, 4, 5, 5))
    assert report.evidence.updated_in_backward == ()


def test_frozen_layers_are_left_alone():
    model, loader = model_and_loader(gb.nn.FrozenBatchNorm2d(4))
    model[1].running_mean.fill_(0.5)
    report = gb.diagnose(model.train(), loader)
    assert report.healthy, str(report)
    assert [layer.frozen for layer in report.evidence.layers] == [True]


@pytest.mark.parametrize("kind", ["fused", "ghost", "frozen"])
def test_converted_models(kind):
    model, loader = model_and_loader(nn.BatchNorm2d(4))
    gb.recalibrate(model, loader)
    converted = gb.convert(model, to=kind)
    assert gb.diagnose(converted, loader).healthy
