"""recalibrate reaches a norm however its model uses it, or names it as not reached."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gammabeta as gb
from gammabeta.errors import SurgeryError
from gammabeta.stats.recalibrate import NotCalibrated

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")


class Two(nn.Module):
    """Two norms; ``use`` says how the second one is run."""

    def __init__(self, use: Callable[[nn.Module, Tensor], Tensor], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.norm = nn.BatchNorm2d(3) if norm is None else norm
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        """Run (N, 3, H, W)."""
        return self.use(self.norm, 2 * self.first(x) + 5)


def functional(norm: nn.Module, x: Tensor) -> Tensor:
    training = norm.training
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training, 0.1, 1e-5)


def by_operator(norm: nn.Module, x: Tensor) -> Tensor:
    state = norm.weight, norm.bias, norm.running_mean, norm.running_var
    return torch.batch_norm(x, *state, norm.training, 0.1, 1e-5, False)


def without_update(norm: nn.Module, x: Tensor) -> Tensor:
    state = norm.weight, norm.bias, norm.running_mean.data, norm.running_var.data
    return torch.ops.aten._native_batch_norm_legit_no_training(x, *state, 0.1, 1e-5)[0]


class OwnForward(nn.BatchNorm2d):
    """A subclass whose input is in another layout."""

    def forward(self, x: Tensor) -> Tensor:
        """Run (N, H, W, C)."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class OwnArithmetic(nn.Module):
    """A batch norm of nobody's, with statistics of shape (1, C, 1, 1) as parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.moving_mean = nn.Parameter(torch.zeros(1, 3, 1, 1), requires_grad=False)
        self.moving_var = nn.Parameter(torch.ones(1, 3, 1, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, and update in training."""
        mean, var = self.moving_mean, self.moving_var
        if self.training:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
            self.moving_mean.data.lerp_(mean, 0.1)
            self.moving_var.data.lerp_(var, 0.1)
        return (x - mean) / (var + 1e-5).sqrt()


class LastChannels(nn.Module):
    """The same on (N, H, W, C), in training by torch's function."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over all but the last dimension."""
        if self.training:
            state = self.running_mean, self.running_var
            return F.batch_norm(x.movedim(-1, 1), *state, training=True).movedim(1, -1)
        return (x - self.running_mean) * (self.running_var + 1e-5).rsqrt()


def last(norm: nn.Module, x: Tensor) -> Tensor:
    return norm(x.permute(0, 2, 3, 1))


def call(norm: nn.Module, x: Tensor) -> Tensor:
    return norm(x)


USES = {
    "called": lambda: Two(call),
    "forward called": lambda: Two(lambda norm, x: norm.forward(x)),
    "forward of the class": lambda: Two(lambda norm, x: nn.BatchNorm2d.forward(norm, x)),
    "our forward called": lambda: Two(lambda norm, x: norm.forward(x), gb.nn.BatchNorm2d(3)),
    "our forward of the class": lambda: Two(lambda n, x: type(n).forward(n, x), gb.nn.BatchNorm2d(3)),
    "functional": lambda: Two(functional),
    "torch.batch_norm": lambda: Two(by_operator),
    "operator on .data": lambda: Two(without_update),
    "by keyword": lambda: Two(lambda norm, x: norm(input=x)),
    "own forward": lambda: Two(last, OwnForward(3)),
    "own arithmetic": lambda: Two(call, OwnArithmetic()),
    "channels last": lambda: Two(last, LastChannels()),
    "scripted": lambda: Two(call, torch.jit.script(nn.BatchNorm2d(3))),
    "traced": lambda: Two(call, torch.jit.trace(nn.BatchNorm2d(3).eval(), torch.randn(2, 3, 4, 4))),
    "compiled": lambda: Two(call, torch.compile(nn.BatchNorm2d(3), backend="eager")),
    "synchronized": lambda: Two(functional, nn.SyncBatchNorm(3)),
    "torch function": lambda: Two(torch.compile(functional, backend="eager")),
}
CONTEXTS = {
    "plain": lambda: torch.enable_grad(),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def data() -> list[Tensor]:
    return [torch.randn(n, 3, 4, 4) + 2 for n in (8, 5, 1, 8)]


@pytest.mark.parametrize("mode", ["joint", "in-order"])
@pytest.mark.parametrize("use", USES)
def test_every_way_to_use_a_norm(use, mode):
    torch.manual_seed(0)
    model, twin, batches = USES[use]().eval(), Two(call), data()
    gb.recalibrate(twin, batches, mode=mode)
    gb.recalibrate(model, batches, mode=mode)
    for name in ("first", "norm"):
        expected = getattr(twin, name)
        got = dict(getattr(model, name).state_dict())
        mean, var = (next(v for k, v in got.items() if k.endswith(end)).flatten() for end in ("mean", "var"))
        torch.testing.assert_close(mean, expected.running_mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(var, expected.running_var, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("use", ["called", "forward called", "functional", "scripted", "own arithmetic"])
def test_the_same_in_every_mode(use, context):
    torch.manual_seed(0)
    model, twin, batches = USES[use](), USES[use](), data()
    gb.recalibrate(twin, batches)
    with CONTEXTS[context]():
        gb.recalibrate(model, batches)
    for one, other in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_another_default_dtype_and_deterministic_algorithms():
    x = data()
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        model = gb.recalibrate(Two(functional), [part.double() for part in x])
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
    assert model.norm.running_mean.dtype == torch.float64
    torch.testing.assert_close(model.norm.running_mean, torch.full((3,), 5.0).double(), rtol=0.01, atol=0)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel], ids=str)
def test_wrappers(wrap):
    model = wrap(Two(functional))
    gb.recalibrate(model, data())
    assert float(model.module.norm.running_mean.mean()) == pytest.approx(5, rel=0.05)


def test_a_norm_that_is_not_reached_is_named():
    class Unused(Two):
        def __init__(self) -> None:
            super().__init__(call)
            self.spare = nn.BatchNorm2d(3)

    for mode in ("joint", "in-order"):
        with pytest.warns(NotCalibrated, match="spare: the data did not reach it"):
            model = gb.recalibrate(Unused(), data(), mode=mode)
        assert float(model.norm.running_mean.mean()) == pytest.approx(5, rel=0.05)
        assert float(model.spare.running_mean.abs().max()) == 0


def test_a_class_that_is_not_understood_is_named_and_kept():
    class Strange(OwnArithmetic):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.training else x * self.moving_var + self.moving_mean

    model = Two(call, Strange())
    with pytest.warns(NotCalibrated, match="norm: Strange is not known to be a batch normalization"):
        gb.recalibrate(model, data())
    assert float(model.norm.moving_mean.abs().max()) == 0
    with pytest.raises(SurgeryError, match=r"reaches a batch-norm.*Strange is not known"):
        gb.recalibrate(nn.Sequential(Strange()), data())


class NormEval(nn.Module):
    """Batch norm that the model's own ``train()`` holds in evaluation, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.head = nn.BatchNorm2d(3)

    def train(self, mode: bool = True) -> "NormEval":
        """Leave the body in evaluation."""
        super().train(mode)
        self.body.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Run (N, 3, H, W)."""
        return self.head(self.body(x))


@pytest.mark.parametrize("training", [True, False])
def test_a_norm_that_train_holds_in_evaluation_is_left_and_named(training):
    model = NormEval().train(training)
    before = model.body[1].running_mean.clone()
    with pytest.warns(NotCalibrated, match=r"body\.1: train\(\) of NormEval holds it in evaluation"):
        gb.recalibrate(model, data())
    assert torch.equal(model.body[1].running_mean, before)
    assert float(model.head.running_mean.abs().max()) > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gb.recalibrate(model, data(), include_frozen=True)
    assert not torch.equal(model.body[1].running_mean, before)
