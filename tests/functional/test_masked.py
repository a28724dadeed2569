"""Padded batches: a mask gives what the values alone give, whatever the padding holds."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import gammabeta as gb
from gammabeta.errors import UsageError
from gammabeta.functional.masked import mask_of, rows_of

batch_norm = gb.functional.batch_norm


def spread(rows, mask, like):
    out = torch.zeros(mask.shape + like.shape[1:2], dtype=rows.dtype)
    return out.masked_scatter(mask.unsqueeze(-1), rows).movedim(-1, 1)


def alone(function, x, mask, residual, grad):
    """Output, gradients and running values of the values alone, as rows; padded again."""
    channels = x.shape[1]
    torch.manual_seed(1)
    weight, bias, mean, var = (torch.randn(channels, dtype=torch.float64).to(x.dtype) for _ in range(4))
    var = var.square() + 0.5
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias, residual)]
    out = function(leaves[0], mean, var, *leaves[1:])
    return [out, *torch.autograd.grad(out, leaves, grad), mean, var]


def both(x, mask, activation="relu", training=True):
    """The same by rows in torch's operators, and by the mask; all in the padded shape."""
    generator = torch.Generator().manual_seed(0)
    residual, grad = (
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for _ in range(2)
    )

    def by_rows(x, mean, var, weight, bias, residual):
        out = F.batch_norm(x, mean, var, weight, bias, training) + residual
        return F.relu(out) if activation == "relu" else torch.sigmoid(out)

    def masked(x, mean, var, weight, bias, residual):
        keywords = {"activation": activation, "residual": residual, "mask": mask}
        return batch_norm(x, mean, var, weight, bias, training, **keywords)

    rows = alone(by_rows, *(rows_of(t, mask) if t is x else t for t in (x, mask)), rows_of(residual, mask),
                 rows_of(grad, mask))  # fmt: skip
    big = [0, 1, 4]
    expected = [spread(t, mask, x) if i in big else t for i, t in enumerate(rows)]
    return alone(masked, x, mask, residual, grad), expected


def batch(lengths, longest, channels, dtype, layout="contiguous", padding=torch.nan):
    """Sequences (N, C, L) whose padding is anything, and their mask."""
    torch.manual_seed(sum(lengths))
    x = torch.randn(len(lengths), channels, longest, dtype=dtype) * 3 + 5
    mask = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
    x = torch.where(mask.unsqueeze(1), x, padding)
    return (x if layout == "contiguous" else x.transpose(1, 2).contiguous().transpose(1, 2)), mask


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 37), min_size=1, max_size=6).filter(lambda found: sum(found) > 1),
    channels=st.integers(1, 20),
    layout=st.sampled_from(["contiguous", "channels_last"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    padding=st.sampled_from([0.0, 1e30, float("nan"), float("inf")]),
)
def test_padded_equals_unpadded(lengths, channels, layout, dtype, padding):
    x, mask = batch(lengths, 37, channels, dtype, layout, padding)
    found, expected = both(x, mask, "sigmoid")
    rows = rows_of(x, mask)
    # Subtracting the mean costs the digits that values share: few where two of a channel lie close together.
    lost = 1 + float((rows.abs().max(0).values / (rows.std(0) + 1e-3)).max())
    close = (1e-12 if dtype is torch.float64 else 1e-6) * lost
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).detach().abs().max()) <= close * max(
            1.0, float(other.detach().abs().max())
        )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_beside_float64(layout):
    """In float32: against the values alone in float64, at a mean of 1e4 too."""
    x, mask = batch([0, 1, 300, 17, 64], 300, 24, torch.float32, layout)
    for shift in (0.0, 1e4):
        found, _ = both(x + shift, mask, "sigmoid")
        exact, _ = both((x + shift).double(), mask, "sigmoid")
        for one, other in zip(found, exact, strict=True):
            size = max(1.0, float(other.detach().abs().max()))
            torch.testing.assert_close(one.double(), other, rtol=0, atol=(2e-6 if not shift else 2e-3) * size)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 6, 5), (2, 3, 4, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_shape_and_mask(shape, training, dtype):
    torch.manual_seed(0)
    mask = torch.rand(shape[0], *shape[2:]) > 0.4
    x = torch.where(mask.unsqueeze(1), torch.randn(shape), torch.nan).to(dtype)
    found, expected = both(x, mask, training=training)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2 if dtype is torch.bfloat16 else 1e-4, atol=2e-2)


def test_differentiable_twice():
    x, mask = batch([0, 1, 5, 3], 5, 3, torch.float64, padding=7.0)
    weight, bias = torch.rand(3).double(), torch.rand(3).double()
    inputs = [t.requires_grad_() for t in (x, weight, bias, torch.randn_like(x))]

    def function(x, weight, bias, residual):
        return batch_norm(
            x, None, None, weight, bias, True, activation="tanh", residual=residual, lengths=[0, 1, 5, 3]
        )

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    x = (
        x.detach().float().requires_grad_()
    )  # the kernels' rule: its second derivative is that of torch's operators
    out = batch_norm(x, None, None, training=True, mask=mask, activation="tanh")
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    (found,) = torch.autograd.grad(dx.square().sum(), x)
    exact = x.detach().double().requires_grad_()
    out = gb.reference.batch_norm(exact, None, None, training=True, mask=mask, activation="tanh")
    (dx,) = torch.autograd.grad(out.square().sum(), exact, create_graph=True)
    (expected,) = torch.autograd.grad(dx.square().sum(), exact)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_the_reference_says_the_same():
    x, mask = batch([4, 0, 9], 9, 3, torch.float64)
    results = []
    for function in (batch_norm, gb.reference.batch_norm):
        mean, var, leaf = torch.zeros(3).double(), torch.ones(3).double(), x.clone().requires_grad_()
        out = function(leaf, mean, var, training=True, lengths=torch.tensor([4, 0, 9]), activation="sigmoid")
        (dx,) = torch.autograd.grad(out.square().sum(), leaf)
        results.append([out, dx, mean, var])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert gb.reference.batch_statistics(x, mask).count == 13


def test_nothing_kept_counts_nothing():
    layer = gb.nn.BatchNorm1d(3)
    x = torch.full((2, 3, 4), torch.nan, requires_grad=True)
    out = layer(x, lengths=[0, 0])
    out.sum().backward()
    assert not out.any()
    assert not x.grad.any()
    assert int(layer.num_batches_tracked) == 0
    assert layer.running_var.eq(1).all()


def test_one_value_raises_torchs_error():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        gb.nn.BatchNorm1d(3)(torch.randn(2, 3, 4), lengths=[1, 0])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"mask": torch.ones(2, 5, dtype=torch.bool)}, "mask must be a bool tensor"),
        ({"mask": torch.ones(2, 4)}, "mask must be a bool tensor"),
        ({"lengths": [1, 5]}, "between 0 and 4"),
        ({"lengths": [1]}, "2 whole numbers"),
        ({"lengths": [1.0, 2.0]}, "2 whole numbers"),
        ({"lengths": [1, 2], "mask": torch.ones(2, 4, dtype=torch.bool)}, "give one of them"),
        ({"lengths": [3, 2], "residual": torch.ones(1, 3, 4)}, "the residual has the shape of the input"),
    ],
)
def test_what_does_not_fit_is_said(keywords, message):
    with pytest.raises(UsageError, match=message):
        batch_norm(torch.randn(2, 3, 4).double(), None, None, training=True, **keywords)


def test_a_pool_is_refused():
    with pytest.raises(UsageError, match="do not go together"):
        batch_norm(torch.randn(2, 3, 4, 4), None, None, training=True, pool=2, mask=torch.rand(2, 4, 4) > 0.5)


def test_layers():
    x, mask = batch([5, 0, 8, 1], 8, 6, torch.float32)
    for kind in (gb.nn.BatchNorm1d, gb.nn.SyncBatchNorm, gb.nn.FrozenBatchNorm1d, gb.nn.LazyBatchNorm1d):
        layer = kind() if kind is gb.nn.LazyBatchNorm1d else kind(6)
        plain = torch.nn.BatchNorm1d(6).train(kind is not gb.nn.FrozenBatchNorm1d)
        expected = spread(plain(rows_of(x, mask)), mask, x)
        torch.testing.assert_close(layer(x, mask=mask), expected)
        torch.testing.assert_close(dict(layer.named_buffers()), dict(plain.named_buffers()))
    with pytest.raises(UsageError, match="takes no mask"):
        gb.nn.GhostBatchNorm1d(6)(x, mask=mask)


class Padded(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv1d(3, 6, 1)
        self.bn = gb.nn.BatchNorm1d(6)
        self.out = torch.nn.Conv1d(6, 4, 1)
        self.last = gb.nn.BatchNorm1d(4)

    def forward(self, x, mask=None):
        x = torch.relu(self.bn(self.conv(x), mask=mask))
        return self.last(self.out(x), mask=mask)


def test_recalibrate_and_convert_hand_it_on():
    torch.manual_seed(0)
    x, mask = batch([5, 0, 8, 2], 8, 3, torch.float32, padding=100.0)
    model, rows = Padded(), Padded()
    rows.load_state_dict(model.state_dict())
    converted = gb.convert(model, example={"x": x, "mask": mask})
    torch.testing.assert_close(converted.eval()(x, mask), model.eval()(x, mask))
    gb.recalibrate(model, [{"x": x, "mask": mask}])
    gb.recalibrate(rows, [rows_of(x, mask).T.unsqueeze(0)])
    torch.testing.assert_close(dict(model.named_buffers()), dict(rows.named_buffers()))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_graph_breaks_there():
    x, mask = batch([5, 0, 8, 1], 8, 6, torch.float32, padding=0.0)
    layer, twin = gb.nn.BatchNorm1d(6), gb.nn.BatchNorm1d(6)
    compiled = torch.compile(lambda t: layer(t * 2, mask=mask) + 1, backend="eager")
    torch.testing.assert_close(compiled(x), twin(x * 2, mask=mask) + 1)


def test_a_mask_that_is_changed_is_read_again():
    x, mask = batch([5, 8], 8, 3, torch.float32, padding=1.0)
    batch_norm(x, None, None, training=True, mask=mask)
    mask[0, 2:] = False
    out = batch_norm(x, None, None, training=True, mask=mask)
    assert not out[0, :, 2:].any()
    torch.testing.assert_close(rows_of(out, mask), F.batch_norm(rows_of(x, mask), None, None, training=True))
    assert mask_of(x, None, [2, 8]).equal(mask)
