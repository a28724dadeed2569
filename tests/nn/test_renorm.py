"""Batch renormalisation, and batches with one value per channel."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import gammabeta as gb
from gammabeta.errors import UsageError

KINDS = {2: gb.nn.BatchRenorm1d, 3: gb.nn.BatchRenorm1d, 4: gb.nn.BatchRenorm2d, 5: gb.nn.BatchRenorm3d}


def made(shape, seen, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    layer = KINDS[len(shape)](shape[1], **settings).to(dtype)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.3, 3)
    torch.nn.init.normal_(layer.weight)
    layer.num_batches_tracked.fill_(seen)
    return layer


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 6), (2, 3, 5, 5), (2, 3, 2, 3, 4), (16, 64, 16, 16)])
@pytest.mark.parametrize("seen", [0, 15000, 100_000])
def test_beside_the_reference(shape, seen):
    dtype = torch.float32 if shape[0] == 16 else torch.float64
    layer = made(shape, seen, dtype)
    limits = {0: (1.0, 0.0), 15000: (1 + 2 * 10000 / 35000, 2.5), 100_000: (3.0, 5.0)}[seen]
    torch.testing.assert_close([float(t) for t in layer.limits()], list(limits), rtol=1e-6, atol=0)
    x, grad = torch.randn(shape, dtype=dtype) * 2 + 1, torch.randn(shape, dtype=dtype)
    running = gb.reference.RunningStatistics(
        layer.running_mean.clone().double(), layer.running_var.clone().double()
    )
    leaves = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    expected, after = gb.reference.batch_renorm(leaves[0], running, *leaves[1:], limits)
    wanted = torch.autograd.grad(expected, leaves, grad.double())
    x.requires_grad_()
    out = layer(x)
    found = torch.autograd.grad(out, (x, layer.weight, layer.bias), grad)
    close = {"rtol": 1e-6, "atol": 1e-6} if dtype is torch.float64 else {"rtol": 1e-3, "atol": 1e-3}
    for one, other in zip((out, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(one.double(), other, **close)
    torch.testing.assert_close(layer.running_mean.double(), after.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), after.var, rtol=1e-5, atol=1e-6)
    assert int(layer.num_batches_tracked) == seen + 1


def test_within_the_limits_training_is_evaluation():
    layer = made((4, 3, 6), 10**6, r_max=1e6, d_max=1e6)
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    expected = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)


def test_at_first_it_is_batch_norm():
    layer, plain = gb.nn.BatchRenorm2d(3), torch.nn.BatchNorm2d(3, momentum=0.01)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())
    assert "r_max=3.0" in repr(layer)


def test_gradients():
    layer = made((4, 3, 2), 10**6, activation="tanh", momentum=0.0)
    x = torch.randn(4, 3, 2, dtype=torch.float64) * 3 + 1

    def function(weight, bias, residual):
        layer._parameters["weight"], layer._parameters["bias"] = weight, bias
        return layer(x, residual)

    inputs = [t.detach().requires_grad_() for t in (layer.weight, layer.bias, torch.randn_like(x))]
    assert torch.autograd.gradcheck(function, inputs)


def test_padding_and_activation_checkpoints():
    layer, twin = made((3, 2, 4), 20000), made((3, 2, 4), 20000)
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    out = layer(x, lengths=[4, 0, 3])
    kept = torch.cat((x[0], x[2, :, :3]), 1)
    torch.testing.assert_close(torch.cat((out[0], out[2, :, :3]), 1), twin(kept.T).T)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())
    again = checkpoint(layer, x.requires_grad_(), use_reentrant=False)
    with pytest.raises(UsageError, match="repeated inside a backward pass"):
        again.sum().backward()


@pytest.mark.parametrize(
    "wrong", [{"r_max": 0.5}, {"d_max": -1}, {"warmup": 10, "d_steps": 5}, {"track_running_stats": False}]
)
def test_settings_that_cannot_be(wrong):
    with pytest.raises(UsageError, match="batch renormalisation"):
        gb.nn.BatchRenorm1d(3, **wrong)


# --- one value per channel --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [gb.nn.BatchNorm1d, gb.nn.BatchRenorm1d, gb.nn.GhostBatchNorm1d])
def test_single(kind):
    x = torch.randn(1, 3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        kind(3)(x)
    layer = kind(3, single="running")
    layer.running_mean.normal_()
    with pytest.warns(RuntimeWarning, match="normalised with the running statistics"):
        out = layer(x)
    expected = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)
    torch.testing.assert_close(out, expected)
    assert int(layer.num_batches_tracked) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)  # it has warned
        layer(torch.randn(3, 3, 2), lengths=[1, 0, 0]) if kind is gb.nn.BatchNorm1d else None
    layer(torch.randn(4, 3))
    assert int(layer.num_batches_tracked) == 1
    assert "single='running'" in repr(layer)


def test_single_that_cannot_be():
    with pytest.raises(UsageError, match="single must be"):
        gb.nn.BatchNorm1d(3, single="skip")
    with pytest.raises(UsageError, match="keep track"):
        gb.nn.BatchNorm1d(3, single="running", track_running_stats=False)
