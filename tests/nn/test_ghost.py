"""Ghost batches: each normalised by itself, in one call."""

import copy

import pytest
import torch
import torch.nn.functional as F

import gammabeta as gb


def by_hand(x, layer, groups, residual=None):
    """A loop over the ghost batches with torch's function; statistics averaged as documented."""
    out, means, variances, weights = torch.empty_like(x), [], [], []
    for index in groups:
        part = x[index]
        out[index] = F.batch_norm(part, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)
        axes = [d for d in range(x.dim()) if d != 1]
        means.append(part.mean(axes))
        variances.append(part.var(axes, correction=1))
        weights.append(len(index))
    share = torch.tensor(weights) / sum(weights)
    mean = sum(s * m for s, m in zip(share, means, strict=True))
    var = sum(s * v for s, v in zip(share, variances, strict=True))
    return out if residual is None else out + residual, mean, var


def evenly(first, count, groups):
    return [torch.arange(first + g, first + count, groups) for g in range(groups)]


@pytest.mark.parametrize(
    ("size", "virtual", "groups"),
    [
        (12, 4, evenly(0, 12, 3)),
        (7, 8, evenly(0, 7, 1)),
        (15, 8, evenly(0, 15, 1)),
        (14, 4, evenly(0, 4, 1) + evenly(4, 10, 2)),
        (11, 3, evenly(0, 3, 1) + evenly(3, 8, 2)),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_against_a_loop(layout, size, virtual, groups):
    assert sorted(i for g in groups for i in g.tolist()) == list(range(size))
    layer = gb.nn.GhostBatchNorm2d(3, virtual_batch_size=virtual)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(3) + 0.5)
        layer.bias.copy_(torch.randn(3))
    x = torch.randn(size, 3, 5, 4).contiguous(memory_format=layout).requires_grad_()
    residual = torch.randn(size, 3, 5, 4, requires_grad=True)
    out = layer(x, residual)
    expected, mean, var = by_hand(x, layer, groups, residual)
    grad = torch.randn(out.shape)
    inputs = [x, residual, layer.weight, layer.bias]
    torch.testing.assert_close(
        [out, *torch.autograd.grad(out, inputs, grad)],
        [expected, *torch.autograd.grad(expected, inputs, grad)],
        rtol=1e-4,
        atol=1e-4,
    )
    torch.testing.assert_close(layer.running_mean, 0.1 * mean)
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * var)
    assert int(layer.num_batches_tracked) == 1


def test_large_batch_through_the_kernels():
    layer = gb.nn.GhostBatchNorm2d(8, virtual_batch_size=16, activation="relu", pool=2)
    x = torch.randn(64, 8, 16, 16)
    expected, mean, var = by_hand(x, layer, evenly(0, 64, 4))
    torch.testing.assert_close(layer(x), F.avg_pool2d(F.relu(expected), 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.running_mean, 0.1 * mean)
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * var)


def test_evaluation_state_dict_and_safety_are_those_of_batch_norm():
    layer, plain = gb.nn.GhostBatchNorm1d(3, virtual_batch_size=2), torch.nn.BatchNorm1d(3)
    layer(torch.randn(8, 3))
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(8, 3)
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))
    before = copy.deepcopy(layer.train().state_dict())
    with pytest.warns(RuntimeWarning, match="non-finite"):
        layer(torch.full((8, 3), float("inf")))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    assert "virtual_batch_size=2" in repr(layer)
    assert layer(x[:0]).shape == (0, 3)


def test_refuses():
    with pytest.raises(gb.errors.UsageError, match="virtual_batch_size"):
        gb.nn.GhostBatchNorm2d(3, virtual_batch_size=0)
    with pytest.raises(ValueError, match="more than 1 value"):
        gb.nn.GhostBatchNorm1d(3, virtual_batch_size=1)(torch.randn(8, 3))
