"""The reference against float64 finite differences, against torch, and against what must not matter to it."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from gammabeta import elementary, reference
from gammabeta.epilogue import Epilogue
from gammabeta.errors import UsageError

SHAPES = [(4, 3), (3, 2, 3), (2, 2, 3, 2), (2, 1, 1, 2, 2)]
double = partial(torch.randn, dtype=torch.float64)
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)
drawn = settings(max_examples=40, deadline=None, derandomize=True)
shapes = st.tuples(
    st.integers(2, 5), st.integers(1, 4), st.lists(st.integers(1, 4), max_size=3).map(tuple)
).map(lambda s: (s[0], s[1], *s[2]))


def arguments(shape: tuple[int, ...], **options: Any) -> dict[str, Tensor]:
    channels = shape[1]
    return {
        "x": (double(shape, **options) * 3 + 1).detach().requires_grad_(),
        "weight": double(channels).requires_grad_(),
        "bias": double(channels).requires_grad_(),
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated")  # torch's own, in forward mode
def test_gradients_first_and_second(shape: tuple[int, ...], training: bool, activation: str | None) -> None:
    given_ = arguments(shape)
    mean, var = double(shape[1]), double(shape[1]).square() + 0.5

    def layer(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return reference.batch_norm(
            x, mean.clone(), var.clone(), weight, bias, training, activation=activation, residual=residual
        )

    inputs = (*given_.values(), double(shape).requires_grad_())
    assert gradcheck(layer, inputs, check_forward_ad=True)
    assert gradgradcheck(layer, inputs)


@drawn
@given(shape=shapes, training=st.booleans(), momentum=st.floats(0, 1), seed=st.integers(0, 1000))
def test_agrees_with_torch(shape: tuple[int, ...], training: bool, momentum: float, seed: int) -> None:
    torch.manual_seed(seed)
    given_ = arguments(shape)
    upstream = double(shape)
    start = (double(shape[1]), double(shape[1]).square() + 0.5)
    results = []
    for function in (reference.batch_norm, F.batch_norm):
        mean, var = start[0].clone(), start[1].clone()
        out = function(
            given_["x"], mean, var, given_["weight"], given_["bias"], training=training, momentum=momentum
        )
        results.append([out, *torch.autograd.grad(out, list(given_.values()), upstream), mean, var])
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


@drawn
@given(shape=shapes, seed=st.integers(0, 1000))
def test_analytic_backward_equals_autograd(shape: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    given_ = arguments(shape)
    x, weight = given_["x"], given_["weight"]
    upstream, mean, var = double(shape), double(shape[1]), double(shape[1]).square() + 0.5
    for training in (True, False):
        out = reference.batch_norm(x, mean.clone(), var.clone(), weight, given_["bias"], training)
        expected = torch.autograd.grad(out, list(given_.values()), upstream)
        by_hand = (
            [
                reference.backward_training(upstream, x, weight),
                reference.backward_step_by_step(upstream, x, weight),
            ]
            if training
            else [reference.backward_evaluation(upstream, x, mean, var, weight)]
        )
        for gradients in by_hand:
            for ours, autograd in zip((gradients.x, gradients.weight, gradients.bias), expected, strict=True):
                close(ours, autograd)


@pytest.mark.parametrize("name", elementary.ACTIVATIONS)
@pytest.mark.parametrize("pool", [None, 2])
def test_activation_residual_and_pool_agree_with_torch(name: str, pool: int | None) -> None:
    given_ = arguments((3, 2, 5, 4))
    residual, inputs = double(3, 2, 5, 4), list(given_.values())
    z = F.batch_norm(given_["x"], None, None, given_["weight"], given_["bias"], training=True) + residual
    theirs = Epilogue(name, pool).apply(z)
    ours = reference.batch_norm(
        given_["x"], None, None, *inputs[1:], training=True, activation=name, residual=residual, pool=pool
    )
    upstream = double(theirs.shape)
    close(ours, theirs)
    for mine, torchs in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(theirs, inputs, upstream),
        strict=True,
    ):
        close(mine, torchs, **_as_torch(name))


def _as_torch(name: str) -> dict[str, float]:
    """torch's derivative of hardsigmoid is 1/6 in float32, whatever the dtype."""
    return {"rtol": 1e-7, "atol": 1e-7} if name == "hardsigmoid" else {}


@pytest.mark.parametrize("name", elementary.ACTIVATIONS)
def test_activation_corners_are_torch_s(name: str) -> None:
    z = torch.tensor(
        [-3.0, -1.0, 0.0, 1.0, 3.0, 6.0, 7.0, -9.0, float("nan")], dtype=torch.float64, requires_grad=True
    )
    ours, theirs = elementary.ACTIVATIONS[name](z), Epilogue(name).apply(z)
    close(ours, theirs, equal_nan=True)
    if name == "hardswish" and torch.__version__ < "2.7":
        pytest.skip("PyTorch 2.6 has the other one-sided derivative at -3 and 3")
    close(*(torch.autograd.grad(out[:-1].sum(), z)[0][:-1] for out in (ours, theirs)), **_as_torch(name))


@drawn
@given(shape=shapes, shift=st.floats(-50, 50), scale=st.floats(0.5, 20), seed=st.integers(0, 1000))
def test_shift_scale_and_order_do_not_matter_in_training(
    shape: tuple[int, ...], shift: float, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    x, order = double(shape), torch.randperm(shape[0])
    train = partial(reference.batch_norm, running_mean=None, running_var=None, training=True, eps=1e-30)
    close(train(x * scale + shift), train(x), rtol=1e-6, atol=1e-6)
    close(train(x[order]), train(x)[order])


@drawn
@given(sizes=st.lists(st.integers(1, 6), min_size=2, max_size=6), seed=st.integers(0, 1000))
def test_pooled_statistics_do_not_depend_on_the_split(sizes: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    x = double(sum(sizes), 3, 2) * 4 + 7
    running = reference.RunningStatistics.initial(3, dtype=torch.float64)
    for batch in x.split(sizes):
        running = reference.update_pooled(running, reference.batch_statistics(batch))
    close(running.mean, x.mean((0, 2)))
    close(running.var, x.var((0, 2)))  # unbiased
    assert (running.batches, running.count) == (len(sizes), sum(sizes) * 2)


def test_running_statistics_of_every_kind() -> None:
    batches = [reference.batch_statistics(double(4, 2) + k) for k in range(3)]
    start = reference.RunningStatistics.initial(2, dtype=torch.float64)
    torch_layer = torch.nn.BatchNorm1d(2, momentum=None, dtype=torch.float64)
    exponential = first = cumulative = start
    for batch in batches:
        exponential = reference.update_exponential(exponential, batch, 0.25)
        first = reference.update_from_first_batch(first, batch, 0.25)
        cumulative = reference.update_cumulative(cumulative, batch)
    means, variances = [b.mean for b in batches], [b.var * 4 / 3 for b in batches]
    for values, index in ((means, 0), (variances, 1)):
        name = ("mean", "var")[index]
        new = 0.25 * (0.75**2 * values[0] + 0.75 * values[1] + values[2])
        close(getattr(exponential, name), 0.75**3 * index + new)
        close(getattr(first, name), 0.75**2 * values[0] + 0.25 * (0.75 * values[1] + values[2]))
        close(getattr(cumulative, name), sum(values) / 3)
    assert torch.equal(start.mean, torch.zeros_like(start.mean))
    torch.manual_seed(20150211)
    for k in range(3):
        torch_layer(double(4, 2) + k)
    close(cumulative.mean, torch_layer.running_mean)
    close(cumulative.var, torch_layer.running_var)


def test_the_notebook_s_printed_examples() -> None:
    ones, zeros = torch.ones(2), torch.zeros(2)
    a = torch.tensor([1.0, 7, 5, 4, 6, 10]).reshape(3, 2)
    b = torch.tensor([1.0, 6, 5, 7, 4, 3, 2, 5, 6, 3, 2, 4, 5, 3, 2, 5]).reshape(2, 2, 2, 2)  # 16 of its 17
    printed_a = torch.tensor([[-1.3887237, 0.0], [0.4629079, -1.2247398], [0.9258158, 1.2247398]])
    printed_b = torch.tensor(
        [
            [-1.6378378, 0.88191265, 0.37796256, 1.3858627, 0.30779096, -0.51298493, -1.3337609, 1.1285669],
            [0.88191265, -0.6299376, -1.1338876, -0.12598751, 1.1285669, -0.51298493, -1.3337609, 1.1285669],
        ]
    ).reshape(2, 2, 2, 2)
    for x, printed in ((a, printed_a), (b, printed_b)):
        out = reference.batch_norm_eps_on_std(x, ones, zeros)
        torch.testing.assert_close(out, printed, rtol=0, atol=1e-6)
        on_variance = reference.batch_norm(x, None, None, training=True)
        assert (on_variance - printed).abs().max() > 1e-6  # the flaw can be seen in the printed digits


def test_weight_belongs_to_the_channel_whatever_the_width() -> None:
    x, weight = double(2, 3, 4, 3), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    plain = reference.batch_norm_eps_on_std(x, torch.ones(3), torch.zeros(3))
    close(reference.batch_norm_eps_on_std(x, weight, torch.zeros(3)), plain * weight[:, None, None])


def test_half_precision_is_rounded_once() -> None:
    x = torch.randn(8, 3, 4, 4, dtype=torch.bfloat16)
    wide = reference.batch_norm(x.float(), None, None, training=True)
    assert torch.equal(reference.batch_norm(x, None, None, training=True), wide.bfloat16())


def test_empty_batches_are_torch_s() -> None:
    mean, var = torch.full((3,), 0.5), torch.full((3,), 2.0)
    for training in (True, False):
        assert reference.batch_norm(torch.empty(0, 3, 2), mean, var, training=training).shape == (0, 3, 2)
    assert torch.equal(mean, torch.full((3,), 0.5))
    assert torch.equal(var, torch.full((3,), 2.0))


def test_vmap_over_stacked_batches() -> None:
    x = double(5, 4, 3)
    train = partial(reference.batch_norm, running_mean=None, running_var=None, training=True)
    close(torch.vmap(train)(x), torch.stack([train(each) for each in x]))


def test_evaluation_changes_nothing() -> None:
    mean, var = double(3), double(3).square()
    before = mean.clone(), var.clone()
    reference.batch_norm(double(4, 3), mean, var)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


X = torch.zeros(2, 3)
RUNNING = (torch.zeros(3), torch.ones(3))


@pytest.mark.parametrize(
    ("message", "args", "options"),
    [
        ("must be \\(N, C\\)", (X[0], *RUNNING), {}),
        ("floating point", (X.long(), *RUNNING), {}),
        ("running_mean must have shape", (X, torch.zeros(2), RUNNING[1]), {}),
        ("weight must have shape", (X, *RUNNING, torch.ones(4)), {}),
        ("belong together", (X, RUNNING[0], None), {"training": True}),
        ("pass both", (X, None, None), {}),
        ("more than 1 value per channel", (X[:1], *RUNNING), {"training": True}),
        ("number of batches", (X, *RUNNING), {"training": True, "momentum": None}),
        ("eps must be positive", (X, *RUNNING), {"training": True, "eps": 0}),
        ("eps must be positive", (X, *RUNNING), {"eps": -1e-5}),
        ("is not one of relu", (X, *RUNNING), {"activation": "nonsense"}),
        ("shape of x", (X, *RUNNING), {"residual": torch.zeros(3)}),
        ("pool must be", (X, *RUNNING), {"pool": 3}),
        ("2x2 pooling needs", (X, *RUNNING), {"pool": 2}),
    ],
)
def test_mistakes_are_named(message: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=message):
        reference.batch_norm(*args, **options)


def test_unbiased_variance_of_one_value_is_refused() -> None:
    one = reference.batch_statistics(torch.zeros(1, 3))
    for update in (reference.update_exponential, reference.update_pooled):
        with pytest.raises(UsageError, match="2 values per channel"):
            update(reference.RunningStatistics.initial(3), one)
