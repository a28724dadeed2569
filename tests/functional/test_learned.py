"""PReLU in the pass of a batch norm: against torch in float64, and where torch's operators keep it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gammabeta as gb
from gammabeta.functional import learned
from gammabeta.functional import step as steps

CLASSES = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SHAPES = [(6, 7, 9, 11), (2, 20, 5, 5), (70, 33), (4, 3, 65), (2, 5, 3, 4, 5), (3, 2, 33, 40), (1, 1, 2, 3)]


@pytest.fixture(autouse=True)
def kernels_for_any_size(monkeypatch):
    monkeypatch.setattr(steps, "SMALL_TRAIN", [0, 0, 0])
    monkeypatch.setattr(steps, "SMALL_EVAL", [0, 0, 0])


class Both(nn.Module):
    """A batch norm of a dimension, and PReLU of so many slopes."""

    def __init__(self, shape, slopes, **settings):
        super().__init__()
        self.bn = CLASSES[len(shape)](shape[1], **settings)
        self.act = nn.PReLU(slopes)
        with torch.no_grad():
            for tensor in self.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand_like(tensor) - 0.3)
            if self.bn.running_var is not None:
                self.bn.running_var.abs_().add_(0.5)

    def forward(self, x):
        return self.act(self.bn(x))


def results(model, x, grad):
    """Output, gradients of the input and of all parameters, and the state after."""
    x = x.clone().requires_grad_()  # keeps the layout
    out = model(x)
    out.backward(grad.to(out.dtype))
    values = {"out": out.detach(), "x": x.grad}
    values |= {name: p.grad for name, p in model.named_parameters()}
    return values | {f"after {name}": b for name, b in model.named_buffers()}


def assert_as_true_as_torch(original, x):
    """Ours is off from float64 by no more than a few times torch's float32."""
    grad = torch.randn(x.shape)
    ours, twin = gb.convert(copy.deepcopy(original)), copy.deepcopy(original).double()
    truth = results(twin, x.double(), grad)
    torchs, found = results(original, x, grad), results(ours, x, grad)
    for name, true in truth.items():
        scale = float(true.double().abs().max()) or 1.0
        off, allowed = (float((one[name].double() - true).abs().max()) for one in (found, torchs))
        assert off <= 4 * allowed + 4e-6 * scale, name
    assert found["out"].stride() == torchs["out"].stride()


@pytest.fixture
def joined(monkeypatch):
    """How often a kernel computed both."""
    calls = []
    apply = learned._Learned.apply
    monkeypatch.setattr(learned._Learned, "apply", lambda *given: calls.append(1) or apply(*given))
    return calls


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, per_channel, training, joined):
    model = Both(shape, shape[1] if per_channel else 1).train(training)
    x = 2 * torch.randn(shape) + 1
    assert_as_true_as_torch(model, x)
    assert len(joined) == 1


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_channels_last(training, threads):
    torch.set_num_threads(threads)
    model = Both((5, 18, 30, 31), 18).train(training)
    x = torch.randn(5, 18, 30, 31).contiguous(memory_format=torch.channels_last)
    assert_as_true_as_torch(model, x)


@pytest.mark.parametrize("settings", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}])
def test_settings_of_the_layer(settings, joined):
    assert_as_true_as_torch(Both((4, 6, 9, 9), 6, **settings), torch.randn(4, 6, 9, 9))
    assert joined


def test_at_zero_the_slope_counts(joined):
    """With a weight and a bias of zero everything lies on the corner, as at the start of some networks."""
    model = Both((4, 6, 9, 9), 6)
    with torch.no_grad():
        model.bn.weight.zero_()
        model.bn.bias.zero_()
    assert_as_true_as_torch(model, torch.randn(4, 6, 9, 9))
    assert joined


def test_few_values_below_zero_keep_their_precision():
    """The sum below zero is no difference of large sums."""
    model = Both((4, 6, 9, 9), 6)
    with torch.no_grad():
        model.bn.weight.fill_(1.0)
        model.bn.bias.fill_(2.5)
    x, grad = torch.randn(4, 6, 9, 9), torch.randn(4, 6, 9, 9)
    twin = copy.deepcopy(model).double()
    truth, found = results(twin, x.double(), grad), results(gb.convert(model), x, grad)
    assert 0 < (truth["out"] <= 0).sum() < 40
    torch.testing.assert_close(found["act.weight"].double(), truth["act.weight"], rtol=1e-5, atol=1e-6)


def test_not_finite_values_spread_as_torchs():
    for value in (torch.nan, torch.inf):
        model = Both((4, 6, 9, 9), 6)
        x = torch.randn(4, 6, 9, 9)
        x[1, 2, 3, 4] = value
        grad = torch.randn(x.shape)
        with pytest.warns(RuntimeWarning, match="left out"):
            found = results(gb.convert(copy.deepcopy(model)), x, grad)
        expected = results(model, x, grad)
        for name in ("out", "x", "bn.weight", "bn.bias", "act.weight"):
            assert torch.equal(found[name].isnan(), expected[name].isnan()), name


def test_a_second_derivative():
    model = Both((3, 4, 5, 6), 4)
    ours = gb.convert(copy.deepcopy(model))

    def penalised(model):
        x = torch.linspace(-2, 3, 360).view(3, 4, 5, 6).sin().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
        grad.pow(2).sum().backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    torch.testing.assert_close(penalised(ours), penalised(model), rtol=1e-4, atol=1e-4)


def test_only_what_wants_a_gradient():
    model = Both((4, 6, 9, 9), 6)
    ours = gb.convert(copy.deepcopy(model))
    for name in ("bn.weight", "act.weight"):
        model.get_parameter(name).requires_grad_(False)
        ours.get_parameter(name).requires_grad_(False)
    x, grad = torch.randn(4, 6, 9, 9), torch.randn(4, 6, 9, 9)
    for one in (model, ours):
        one(x).backward(grad)
    assert ours.bn.weight.grad is None
    assert ours.act.weight.grad is None
    torch.testing.assert_close(ours.bn.bias.grad, model.bn.bias.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_torchs(dtype, joined):
    model = Both((4, 6, 9, 9), 6).to(dtype)
    x = torch.randn(4, 6, 9, 9, dtype=dtype)
    found, expected = gb.convert(copy.deepcopy(model))(x), model(x)
    close = {"rtol": 0.02, "atol": 0.02} if dtype is torch.bfloat16 else {}
    torch.testing.assert_close(found, expected, **close)
    assert not joined


@pytest.mark.parametrize("to", ["ghost", "sync"])
def test_layers_that_normalise_otherwise(to):
    model = Both((8, 6, 9, 9), 6)
    x = torch.randn(64, 6, 3, 3)
    other = gb.convert(copy.deepcopy(model), to=to)
    expected = F.prelu(copy.deepcopy(other).bn(x), model.act.weight)
    torch.testing.assert_close(other(x), expected)


def test_a_number_of_slopes_that_does_not_fit_is_torchs_error():
    model = gb.convert(Both((4, 6, 9, 9), 5))
    with pytest.raises(RuntimeError, match=r"slope|parameter|size"):
        model(torch.randn(4, 6, 9, 9))


def test_checkpointing_and_a_graph():
    model = gb.convert(Both((4, 6, 9, 9), 6))
    x = torch.randn(4, 6, 9, 9)
    expected = copy.deepcopy(model)(x)
    graph = torch.compile(copy.deepcopy(model), backend="aot_eager")
    torch.testing.assert_close(graph(x), expected)
    again = torch.utils.checkpoint.checkpoint(model, x.requires_grad_(), use_reentrant=False)
    torch.testing.assert_close(again, expected)
    again.sum().backward()
    assert int(model.bn.num_batches_tracked) == 1
