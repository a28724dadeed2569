"""Frozen statistics stay frozen, whatever is called."""

import copy

import pytest
import torch

import gammabeta as gb


@pytest.mark.parametrize("train_affine", [False, True])
@pytest.mark.parametrize(("dim", "shape"), [(1, (4, 3)), (2, (4, 3, 5, 5)), (3, (2, 3, 3, 4, 2))])
def test_frozen(dim, shape, train_affine):
    plain = getattr(torch.nn, f"BatchNorm{dim}d")(3)
    for _ in range(3):
        plain(torch.randn(shape) * 2 + 1)
    layer = getattr(gb.nn, f"FrozenBatchNorm{dim}d")(3, train_affine=train_affine)
    layer.load_state_dict(plain.state_dict())
    plain.load_state_dict(layer.state_dict())
    plain.eval()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(shape, requires_grad=True)
    torch.nn.Sequential(layer).train()
    layer.training = True  # as some tools do, past train()
    out, expected = layer(x), plain(x)
    grad = torch.randn(shape)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, x, grad, retain_graph=True), torch.autograd.grad(expected, x, grad)
    )
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    assert [p.requires_grad for p in layer.parameters()] == [train_affine] * 2
    if train_affine:
        out.backward(grad)
        expected = plain(x)
        expected.backward(grad)
        torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad)


def test_stays_in_evaluation_mode():
    model = torch.nn.Sequential(gb.nn.FrozenBatchNorm2d(3), torch.nn.Dropout()).train()
    assert not model[0].training
    assert model[1].training


def test_what_follows_and_refusal():
    layer = gb.nn.FrozenBatchNorm2d(3, activation="relu", pool=2)
    assert layer(torch.randn(2, 3, 6, 6)).shape == (2, 3, 3, 3)
    with pytest.raises(gb.errors.UsageError, match="running statistics"):
        gb.nn.FrozenBatchNorm2d(3, track_running_stats=False)
