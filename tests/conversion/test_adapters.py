"""Batch norms, activations and blocks as other libraries write them are taken in, and give the same."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gammabeta as gb

X = torch.randn(4, 3, 6, 6, dtype=torch.float64)


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's: a batch norm whose class drops and activates too, with a forward of its own."""

    def __init__(self, features, act=None, drop=None):
        super().__init__(features)
        self.drop = drop or nn.Identity()
        self.act = act or nn.Identity()

    def forward(self, x):
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            self.momentum,
            self.eps,
        )
        return self.act(self.drop(x))


class FrozenBatchNorm2d(nn.Module):
    """torchvision's and detectron2's: buffers only."""

    def __init__(self, features, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.2), ("bias", 0.1), ("running_mean", 0.2), ("running_var", 1.5)):
            self.register_buffer(name, torch.full((features,), value))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """detectron2's, in one process."""

    def forward(self, input):
        return super().forward(input)


class Inherits(nn.BatchNorm2d):
    """Other defaults, and nothing else."""

    def __init__(self, features):
        super().__init__(features, eps=1e-3, momentum=0.03)


class DropPath(nn.Module):
    def __init__(self, drop_prob=0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        return x * (torch.rand(x.shape[0], 1, 1, 1) > self.drop_prob)


class Swish(nn.Module):
    def forward(self, x):
        return x * x.sigmoid()


class Sigmoid(nn.Module):
    """Named like one that is known, and another function."""

    def forward(self, x):
        return 2 * x.sigmoid()


class Block(nn.Module):
    def __init__(self, norm, act, path=None):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 3, 3, padding=1), norm, act
        self.path = path or nn.Identity()

    def forward(self, x):
        shortcut = x
        x = self.norm(self.conv(x))
        x = self.path(x) + shortcut
        return self.act(x)


def step(model, training):
    model = copy.deepcopy(model).train(training)
    torch.manual_seed(3)
    x = X.clone().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), x.grad, grads, dict(model.named_buffers())


def check(model, **kind):
    """Convert, compare in both modes, and there again after pickling; the converted model."""
    torch.manual_seed(5)
    model.double()
    converted = gb.convert(model, **kind)
    assert list(converted.state_dict()) == list(model.state_dict())
    for twin in (converted, pickle.loads(pickle.dumps(converted)), copy.deepcopy(converted)):
        for training in (True, False):
            torch.testing.assert_close(step(twin, training), step(model, training))
    return converted


CASES = [
    (lambda: BatchNormAct2d(3, nn.ReLU()), nn.SiLU, None, "relu"),
    (lambda: BatchNormAct2d(3), nn.ReLU, None, "residual + relu"),
    (lambda: BatchNormAct2d(3, drop=nn.Dropout(0.5)), nn.ReLU, None, ""),
    (lambda: FrozenBatchNorm2d(3), nn.ReLU, None, "residual + relu"),
    (lambda: NaiveSyncBatchNorm(3), nn.ReLU, None, "residual + relu"),
    (lambda: Inherits(3), nn.ReLU, None, "residual + relu"),
    (lambda: nn.BatchNorm2d(3), nn.ReLU, lambda: DropPath(0.0), "residual + relu"),
    (lambda: nn.BatchNorm2d(3), Swish, None, "residual + silu"),
    (lambda: nn.BatchNorm2d(3), Sigmoid, None, "residual"),
]


@pytest.mark.parametrize("example", [None, X])
@pytest.mark.parametrize(("norm", "act", "path", "fused"), CASES)
def test_taken_in_and_the_same(norm, act, path, fused, example):
    model = Block(norm(), act(), path and path())
    converted = check(model, example=example)
    (change,) = converted.conversion_report.changes
    assert change.layer == "norm"
    assert change.fused == fused
    assert change.before != change.after
    assert "gammabeta" in change.after
    assert isinstance(converted.norm, type(model.norm))


def test_a_path_that_drops_in_training_is_not_passed_over():
    model = Block(nn.BatchNorm2d(3), nn.ReLU(), DropPath(0.5))
    check(model)
    converted = gb.convert(model, example=X)
    (change,) = converted.conversion_report.changes
    assert change.fused in ("residual + relu", "")  # in evaluation, or never


@pytest.mark.parametrize("to", ["ghost", "sync", "frozen"])
def test_every_kind_and_back(to):
    model = Block(BatchNormAct2d(3, nn.ReLU()), nn.SiLU()).double().eval()
    changed = gb.convert(model, to=to)
    assert type(changed.norm).__mro__.index(BatchNormAct2d) > 0
    assert "gammabeta.nn" in changed.conversion_report.changes[0].after
    torch.testing.assert_close(changed.eval()(X), model(X))
    back = gb.convert(changed, to="torch")
    assert type(back.norm) is BatchNormAct2d
    torch.testing.assert_close(back.eval()(X), model(X))


def test_an_own_class_that_calls_the_function():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.rand(3) + 0.5)
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("var", torch.ones(3))

        def forward(self, x):
            x = F.batch_norm(x, self.mean, self.var, self.gamma, None, self.training, 0.2)
            return F.relu(x)

    model = nn.Sequential(nn.Conv2d(3, 3, 1), Own()).double()
    converted = gb.convert(model, example=X)
    for training in (True, False):
        torch.testing.assert_close(step(converted, training), step(model, training))
    (change,) = converted.conversion_report.changes
    assert (change.layer, change.fused) == ("1", "relu")
    assert change.after == "gammabeta.functional.batch_norm (Own)"


class NormThenHalf(nn.BatchNorm2d):
    def __init__(self, features):
        super().__init__(features)
        self.after = nn.ReLU()

    def forward(self, input):
        return self.after(super().forward(input))


def test_a_class_that_a_user_registers():
    model = Block(NormThenHalf(3), nn.SiLU())
    assert "class of its own" in gb.convert(model).conversion_report.changes[0].reason
    gb.register_norm("NormThenHalf", tail=("after",))
    converted = check(model)
    assert converted.conversion_report.changes[0].fused == "relu"
    with pytest.raises(gb.errors.UsageError, match="name of a class"):
        gb.register_norm("not a name")


class Liar(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) * 3


def test_a_class_that_does_something_else_than_its_row_says_is_left():
    gb.register_norm("Liar")
    model = Block(Liar(3), nn.ReLU())
    converted = check(model)
    assert type(converted.norm) is Liar
