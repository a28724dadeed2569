"""recalibrate against float64 over the whole set; and that a failure leaves no trace."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gammabeta as gb
from gammabeta.errors import SurgeryError, UsageError


def images(n: int = 37, channels: int = 3, size: int = 5, mean: float = 1e4) -> torch.Tensor:
    return torch.randn(n, channels, size, size) + mean


def truth(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dims = [0, *range(2, x.dim())]
    return x.double().mean(dims), x.double().var(dims, correction=1)


def state_bytes(model: nn.Module) -> dict[str, bytes]:
    return {name: value.cpu().numpy().tobytes() for name, value in model.state_dict().items()}


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Conv2d(6, 4, 3),
            nn.BatchNorm2d(4),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


SPLITS = [[37], [1, 36], [10, 10, 10, 7], [1] * 37, [5, 1, 30, 1]]


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("mode", ["joint", "in-order"])
@pytest.mark.parametrize("mean", [0.0, 1.0, 1e4])
def test_exact_for_any_split(split, mode, mean):
    x = images(mean=mean)
    bn = nn.BatchNorm2d(3)
    gb.recalibrate(bn, x.split(split), mode=mode)
    true_mean, true_var = truth(x)
    # running_mean is float32: half a unit in its last place is 6e-8 of it.
    torch.testing.assert_close(bn.running_mean.double(), true_mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(bn.running_var.double(), true_var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("split", SPLITS[1:], ids=str)
def test_in_order_is_exact_at_every_depth_and_for_every_split(split):
    x = images(mean=3.0)
    model = ConvNet().double()
    gb.recalibrate(model, x.double().split(split), mode="in-order")
    deep = model.eval().net[:5](x.double())
    true_mean, true_var = truth(deep)
    torch.testing.assert_close(model.net[5].running_mean, true_mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.net[5].running_var, true_var, rtol=1e-9, atol=0)


def test_joint_gives_deeper_layers_what_batches_make_of_the_earlier_ones():
    x = images(mean=3.0)
    model = ConvNet()
    gb.recalibrate(model, x.split(10))
    training = copy.deepcopy(model)
    training.net[3].eval()
    with torch.no_grad():
        deep = torch.cat([training.net[:5](part) for part in x.split(10)])
    true_mean, true_var = truth(deep)
    torch.testing.assert_close(model.net[5].running_mean.double(), true_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.net[5].running_var.double(), true_var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(9, 4), (9, 4, 7), (9, 4, 1, 1), (5, 4, 2, 3, 2)], ids=str)
def test_every_rank_of_input(shape):
    x = torch.randn(shape) * 3 + 50
    bn = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](4)
    gb.recalibrate(bn, x.split(2))
    true_mean, true_var = truth(x)
    torch.testing.assert_close(bn.running_mean.double(), true_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(bn.running_var.double(), true_var, rtol=2e-6, atol=0)


def test_channels_last_and_half_precision_inputs():
    x = images(mean=2.0).contiguous(memory_format=torch.channels_last)
    bn = nn.BatchNorm2d(3)
    gb.recalibrate(bn, x.split(10))
    torch.testing.assert_close(bn.running_var.double(), truth(x)[1], rtol=1e-6, atol=0)
    half = nn.BatchNorm2d(3).bfloat16()
    gb.recalibrate(half, x.split(10))
    expected = truth(x.bfloat16())[1].bfloat16()
    torch.testing.assert_close(half.running_var, expected, rtol=0, atol=0)


def failing(x: torch.Tensor, at: int):
    for index, part in enumerate(x.split(5)):
        if index == at:
            raise OSError("disk gone")
        yield part


@pytest.mark.parametrize("training", [True, False])
def test_a_loader_that_raises_leaves_the_model_bit_for_bit(training):
    model, x = ConvNet().train(training), images()
    model.net[1].momentum = None
    before = state_bytes(model)
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    with pytest.raises(OSError, match="disk gone"):
        gb.recalibrate(model, failing(x, at=3))
    assert state_bytes(model) == before
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert model.net[1].momentum is None
    assert model.net[1].track_running_stats
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


class FailsLate:
    """A loader whose third pass raises in the middle."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.passes = x, 0

    def __iter__(self):
        self.passes += 1
        return failing(self.x, 2 if self.passes == 3 else 99)


def test_in_order_undoes_the_layers_it_had_finished():
    model = ConvNet()
    before = state_bytes(model)
    with pytest.raises(OSError, match="disk gone"):
        gb.recalibrate(model, FailsLate(images()), mode="in-order")
    assert state_bytes(model) == before


def test_non_finite_input_is_refused():
    model = ConvNet()
    before = state_bytes(model)
    x = images()
    x[20, 1, 2, 2] = float("nan")
    with pytest.raises(SurgeryError, match=r"net\.1 is not finite"):
        gb.recalibrate(model, x.split(10))
    assert state_bytes(model) == before


def test_success_restores_modes_and_uses_no_dropout():
    model, x = ConvNet().train(), images(mean=1.0)
    random = torch.get_rng_state()
    assert gb.recalibrate(model, x.split(10)) is model
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.net[5].num_batches_tracked == 4
    again = copy.deepcopy(model)
    gb.recalibrate(again, x.split(10))
    assert state_bytes(again) == state_bytes(model)


def test_reused_layer_pools_every_call():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.bn(x) + self.bn(3 * x + 1)

    x = torch.randn(30, 4)
    for mode in ("joint", "in-order"):
        model = gb.recalibrate(Twice(), x.split(7), mode=mode)
        true_mean, true_var = truth(torch.cat([x, 3 * x + 1]))
        torch.testing.assert_close(model.bn.running_mean.double(), true_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.bn.running_var.double(), true_var, rtol=1e-6, atol=0)


def test_frozen_layers_stay_frozen():
    model = ConvNet().train()
    model.net[1].eval()
    before = model.net[1].running_mean.clone()
    gb.recalibrate(model, images().split(10))
    assert torch.equal(model.net[1].running_mean, before)
    assert not model.net[1].training
    gb.recalibrate(model, images().split(10), include_frozen=True)
    assert not torch.equal(model.net[1].running_mean, before)


def test_frozen_by_gradient_in_a_model_in_evaluation():
    model = ConvNet().eval()
    model.net[1].requires_grad_(False)
    before = model.net[1].running_mean.clone()
    gb.recalibrate(model, images().split(10))
    assert torch.equal(model.net[1].running_mean, before)
    model.requires_grad_(False)  # a deployed model: nothing in it learns, so nothing in it is held back
    gb.recalibrate(model, images().split(10))
    assert not torch.equal(model.net[1].running_mean, before)


def test_layers_without_statistics():
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3, affine=False))
    x = images(mean=1.0)
    gb.recalibrate(model, x.split(10))
    assert model[0].running_mean is None
    assert model[1].running_var is not None
    with pytest.raises(SurgeryError, match="no batch normalization"):
        gb.recalibrate(model[0], x.split(10))


def test_synchronized_layer_on_the_cpu():
    x = images(mean=2.0)
    layer = gb.recalibrate(nn.SyncBatchNorm(3), x.split(10))
    torch.testing.assert_close(layer.running_var.double(), truth(x)[1], rtol=1e-6, atol=0)
    assert layer.training


@pytest.mark.parametrize(
    "form",
    [
        lambda x: DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=8, shuffle=True),
        lambda x: [{"x": part, "label": 0} for part in x.split(8)],
        lambda x: [(part, 1, "name") for part in x.split(8)],
    ],
    ids=["DataLoader", "dict", "tuple"],
)
def test_forms_of_batches(form):
    x = images(mean=1.0)
    model = ConvNet()
    gb.recalibrate(model.eval(), form(x), mode="in-order")
    torch.testing.assert_close(
        model.net[1].running_mean.double(), truth(model.net[0](x).detach())[0], rtol=1e-5, atol=1e-6
    )


def test_forward_fn_and_samples_and_progress():
    x = images(mean=1.0)
    bn = nn.BatchNorm2d(3)
    seen: list[int] = []
    loader = [{"deep": {"image": part}} for part in x.split(10)]
    gb.recalibrate(
        bn,
        loader,
        samples=11,
        forward_fn=lambda model, batch: model(batch["deep"]["image"]),
        progress=seen.append,
    )
    assert seen == [10, 10]
    torch.testing.assert_close(bn.running_mean.double(), truth(x[:20])[0], rtol=1e-6, atol=1e-7)


def test_errors():
    bn = nn.BatchNorm2d(3)
    with pytest.raises(UsageError, match="mode"):
        gb.recalibrate(bn, [images()], mode="both")
    with pytest.raises(UsageError, match="samples"):
        gb.recalibrate(bn, [images()], samples=0)
    with pytest.raises(UsageError, match="iterator"):
        gb.recalibrate(bn, iter([images()]), mode="in-order")
    for mode in ("joint", "in-order"):
        with pytest.raises(SurgeryError, match="no data"):
            gb.recalibrate(bn, [], mode=mode)
        with pytest.raises(SurgeryError, match="one value per channel"):
            gb.recalibrate(bn, [images(1, size=1)], mode=mode)


def test_under_inference_mode_and_for_inference_tensors():
    x = images(mean=1.0)
    with torch.inference_mode():
        made_here = nn.BatchNorm2d(3)
        gb.recalibrate(made_here, x.split(10))
    gb.recalibrate(made_here, x.split(5))
    torch.testing.assert_close(made_here.running_mean.double(), truth(x)[0], rtol=1e-6, atol=1e-7)
