"""The Triton kernels against the reference in float64: every layout, dtype, activation and cut."""

import itertools

import pytest
import torch

from gammabeta.epilogue import ACTIVATIONS, Epilogue, pooled_shape
from gammabeta.kernels.backend import Call, Normalized, Running
from tests import oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = (None, *ACTIVATIONS)
# Odd sizes, length-one axes, few and many channels, runs that no 16-byte load divides and runs that it does.
SHAPES = (
    (7, 5),
    (64, 24),
    (40, 1),
    (4, 3, 7),
    (3, 8, 16),
    (2, 6, 8, 8),
    (3, 20, 9, 7),
    (5, 2, 21, 33),
    (2, 70, 3, 3),
    (6, 3, 1, 5),
    (2, 3, 4, 4, 5),
)
SOME = [
    (
        SHAPES[i % len(SHAPES)],
        ("contiguous", "rows")[i // 2 % 2],
        DTYPES[i % 3],
        NAMES[i % len(NAMES)],
        pooled,
        added,
    )
    for i, (pooled, added) in zip(range(42), itertools.cycle(itertools.product((False, True), (False, True))))
]
EVERY = list(itertools.product(SHAPES, ("contiguous", "rows"), DTYPES, NAMES, (False, True), (False, True)))


def laid_out(t, layout):
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "rows" else t.contiguous()


def case(shape, layout, dtype, activation, pool, added, device):
    """A call on random tensors, and a random upstream gradient."""

    def draw(s, scale=1.0, shift=0.0):
        return (torch.randn(s, device=device) * scale + shift).to(dtype)

    x = laid_out(draw(shape, 2.0, 0.7), layout)
    residual = laid_out(draw(shape), layout) if added else None
    weight = torch.randn(shape[1], device=device)
    bias = torch.randn(shape[1], device=device)
    call = Call(x, weight, bias, residual, Epilogue(activation, pool), 1e-5)
    return call, draw(pooled_shape(shape, pool))


def check_step(gpu, shape, layout, dtype, activation, pool, added, device):
    call, grad = case(shape, layout, dtype, activation, pool, added, device)
    assert gpu.unsupported(call.x, call.residual, call.epilogue) is None
    out, mean, var, invstd = gpu.forward_train(call)
    given = Normalized(call, mean, invstd)
    oracle.assert_outcome(oracle.Outcome(out, *gpu.backward(grad, given, added)), call, grad)
    assert out.dtype == dtype
    assert out.stride() == laid_out(out, layout).stride() or out.numel() == 0
    true_mean, true_var = oracle.statistics(call.x)
    torch.testing.assert_close(mean.double(), true_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), true_var, rtol=2e-6, atol=0)
    torch.testing.assert_close(invstd.double(), (true_var + 1e-5).rsqrt(), rtol=2e-6, atol=0)
    again = gpu.forward(given)
    torch.testing.assert_close(again, out, rtol=0, atol=torch.finfo(dtype).eps * out.abs().max().item())


def runnable(shape, pooled):
    return not pooled or (len(shape) == 4 and min(shape[2:]) >= 2)


@pytest.mark.parametrize(
    ("shape", "layout", "dtype", "activation", "pooled", "added"),
    [c for c in SOME if runnable(c[0], c[4])],
)
def test_equals_float64(gpu, device, shape, layout, dtype, activation, pooled, added):
    check_step(gpu, shape, layout, dtype, activation, 2 if pooled else None, added, device)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(16))
@pytest.mark.parametrize("whole", [False, True])
def test_equals_float64_everywhere(gpu, cut, device, chunk, whole):
    cut(2, whole)
    for shape, layout, dtype, activation, pooled, added in EVERY[chunk::16]:
        if runnable(shape, pooled):
            pool = 2 if pooled else None
            check_step(gpu, shape, layout, dtype, activation, pool, added, device)


@pytest.mark.parametrize("pool", [None, 2])
@pytest.mark.parametrize("layout", ["contiguous", "rows"])
@pytest.mark.parametrize("multiprocessors", [1, 16])
def test_split_reductions(gpu, cut, device, multiprocessors, layout, pool):
    """Few splits of several tiles, and as many as there are tiles: the merge weighs each by its count."""
    from gammabeta.kernels.gpu import plan

    cut(multiprocessors, False)
    shape = (6, 2, 30, 31)
    view = plan.view_of(shape, layout == "rows", pool, 4)
    assert plan.splits(plan.tile(view, 2, True), plan.Chip(multiprocessors, 0)) > 1
    check_step(gpu, shape, layout, torch.float32, "relu", pool, True, device)


@pytest.mark.parametrize("layout", ["contiguous", "rows"])
@pytest.mark.parametrize("whole", [False, True])
def test_large_mean_small_deviation(gpu, cut, device, layout, whole):
    """Mean 1e4, standard deviation 1e-2: the variance of what float32 holds, to 1e-4."""
    cut(4, whole)
    x = laid_out(1e4 + 1e-2 * torch.randn(16, 3, 24, 24, device=device), layout)
    mean, var = gpu.statistics(x)
    true_mean, true_var = oracle.statistics(x)
    torch.testing.assert_close(mean.double(), true_mean, rtol=6e-8, atol=0)
    torch.testing.assert_close(var.double(), true_var, rtol=1e-4, atol=0)


@pytest.mark.parametrize("where", ["first value", "first image"])
def test_first_values_far_from_the_rest(gpu, cut, device, where):
    """The shift comes from the first tile; data that makes it a bad one costs no more than 1 / its share."""
    cut(2, False)
    x = torch.randn(32, 2, 16, 16, device=device)
    if where == "first value":
        x[0, :, 0, 0] = 1e4
    else:
        x[0] += 1e4
    mean, var = gpu.statistics(x)
    true_mean, true_var = oracle.statistics(x)
    torch.testing.assert_close(mean.double(), true_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), true_var, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings(
    "ignore:invalid value"
)  # the interpreter computes with NumPy, which remarks on it
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_input_spoils_its_channel_only(gpu, device, value):
    x = torch.randn(4, 3, 5, 5, device=device)
    x[1, 1, 2, 2] = value
    out, mean, var, _ = gpu.forward_train(Call(x, None, None, None, Epilogue("relu"), 1e-5))
    torch.testing.assert_close(mean[1], x[:, 1].mean(), equal_nan=True)
    assert var[1].isnan()
    assert out[:, 1].isnan().all(), "NaN must pass through the activation, as torch's does"
    assert out[:, ::2].isfinite().all()


def test_an_activation_without_arithmetic_is_refused(gpu, device):
    """``epilogue_of`` refuses the name before; a kernel must never take it for the identity."""
    call, grad = case((4, 3), "contiguous", torch.float32, "nonsense", None, False, device)
    given = Normalized(call, *gpu.statistics(call.x))
    for launch in (
        lambda: gpu.forward_train(call),
        lambda: gpu.forward(given),
        lambda: gpu.backward(grad, given, False),
        lambda: gpu.backward_reduce(grad, given),
    ):
        with pytest.raises(Exception, match="this activation has no arithmetic here"):
            launch()


def test_without_affine(gpu, device):
    call, grad = case((3, 4, 5, 6), "contiguous", torch.float32, "silu", None, False, device)
    found, _ = oracle.by_kernels(gpu, call._replace(weight=None, bias=None), grad)
    ones, zeros = torch.ones(4, device=device), torch.zeros(4, device=device)
    true = oracle.truth(call._replace(weight=ones, bias=zeros), grad)
    for mine, exact in zip(found[:4], true[:4], strict=True):
        oracle.assert_within(mine, exact)


@pytest.mark.parametrize("pool", [None, 2])
@pytest.mark.parametrize("layout", ["contiguous", "rows"])
def test_backward_in_two_parts(gpu, device, layout, pool):
    """Reduce, then apply with the means: the same as the two in one; SyncBatchNorm needs the parts."""
    call, grad = case((3, 4, 7, 6), layout, torch.float32, "gelu", pool, True, device)
    (_, dx, dweight, dbias, dresidual), given = oracle.by_kernels(gpu, call, grad)
    sum_dz, sum_dz_xhat = gpu.backward_reduce(grad, given)
    count = call.x.numel() // 4
    parts = gpu.backward_apply(grad, given, (sum_dz / count, sum_dz_xhat / count), True)
    for mine, whole in zip((*parts, sum_dz_xhat, sum_dz), (dx, dresidual, dweight, dbias), strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-5, atol=1e-5)


def test_evaluation_backward(gpu, device):
    """With given statistics both means are zero: dx is dz times weight * invstd."""
    call, grad = case((3, 4, 6), "contiguous", torch.float32, "hardswish", None, False, device)
    mean, var = torch.randn(4, device=device), torch.rand(4, device=device) + 0.5
    given, zero = Normalized(call, mean, (var + call.eps).rsqrt()), torch.zeros(4, device=device)
    true = oracle.truth(call, grad, (mean, var))
    torch.testing.assert_close(gpu.forward(given).double(), true.out, rtol=1e-5, atol=1e-5)
    dx, none = gpu.backward_apply(grad, given, (zero, zero), False)
    assert none is None
    torch.testing.assert_close(dx.double(), true.dx, rtol=1e-5, atol=1e-5)


def test_any_memory_layout(gpu, device):
    """Slices, expanded gradients and companions in another layout are read rightly."""
    wide = torch.randn(4, 6, 9, 8, device=device)
    x, residual = wide[:, ::2, 1:, ::2], laid_out(torch.randn(4, 3, 8, 4, device=device), "rows")
    weight, bias = torch.randn(3, device=device), torch.randn(3, device=device)
    grad = torch.randn(4, 3, 1, 1, device=device).expand(4, 3, 8, 4)
    call = Call(x, weight, bias, residual, Epilogue("relu"), 1e-5)
    found, _ = oracle.by_kernels(gpu, call, grad)
    for mine, true in zip(found, oracle.truth(call, grad), strict=True):
        oracle.assert_within(mine, true)


@pytest.mark.parametrize("layout", ["contiguous", "rows"])
def test_same_bits_each_time(gpu, cut, device, layout):
    cut(3, False)
    call, grad = case((4, 5, 16, 20), layout, torch.bfloat16, "relu", None, True, device)
    runs = []
    for _ in range(2):
        out, mean, var, invstd = gpu.forward_train(call)
        runs.append((out, mean, var, invstd, *gpu.backward(grad, Normalized(call, mean, invstd), True)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("channels", [3, 1500])
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("skip", [False, True])
def test_update_running(gpu, device, channels, bad, skip):
    """``running = 0.9 * running + 0.1 * batch``, the variance unbiased; a refused batch changes nothing."""
    mean, var = torch.randn(channels, device=device), torch.rand(channels, device=device) + 0.5
    if bad is not None:
        var[-1] = bad
    running_mean, running_var = torch.randn(channels, device=device), torch.rand(channels, device=device)
    before = running_mean.clone(), running_var.clone()
    counted = gpu.update_running(Running(running_mean, running_var, 0.1, skip), mean, var, 11)
    refused = skip and bad is not None
    assert bool(counted) is not refused
    assert counted is True or counted.dtype is torch.bool
    expected = before if refused else (0.9 * before[0] + 0.1 * mean, 0.9 * before[1] + 0.1 * var * 11 / 10)
    torch.testing.assert_close((running_mean, running_var), expected, equal_nan=True)


@pytest.mark.parametrize("shares", [(5, 3), (7, 1)])
def test_shares_of_a_batch_equal_the_whole(gpu, device, shares):
    """What SyncBatchNorm does on GPUs: statistics and sums by share, merged; the rest by share."""
    call, grad = case((8, 4, 6, 5), "rows", torch.float32, "silu", None, True, device)
    out, mean, var, invstd = gpu.forward_train(call)
    dx, _, _, dresidual = gpu.backward(grad, Normalized(call, mean, invstd), True)
    whole = (out, dx, dresidual)
    parts = [
        call._replace(x=x, residual=residual)
        for x, residual in zip(call.x.split(shares), call.residual.split(shares), strict=True)
    ]
    found = [gpu.statistics(part.x) for part in parts]
    share = torch.tensor(shares, device=device).double()[:, None] / 8
    means, variances = (torch.stack([f[i] for f in found]).double() for i in range(2))
    centre = (share * means).sum(0)
    spread = (share * (variances + (means - centre) ** 2)).sum(0)
    torch.testing.assert_close((centre.float(), spread.float()), (mean, var), rtol=1e-6, atol=1e-6)
    given = [Normalized(part, centre.float(), (spread + 1e-5).rsqrt().float()) for part in parts]
    grads = grad.split(shares)
    sums = [gpu.backward_reduce(g, part) for g, part in zip(grads, given, strict=True)]
    means_dz = tuple((sums[0][i] + sums[1][i]) / (call.x.numel() // 4) for i in range(2))
    for i, (g, part) in enumerate(zip(grads, given, strict=True)):
        mine = (gpu.forward(part), *gpu.backward_apply(g, part, means_dz, True))
        for a, b in zip(mine, (t.split(shares)[i] for t in whole), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
