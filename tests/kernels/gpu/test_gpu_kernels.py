"""The Triton kernels against torch in float64: every layout, dtype, activation and cut."""

import itertools

import pytest
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu")
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
        ACTIVATIONS[i % 7],
        pooled,
        added,
    )
    for i, (pooled, added) in zip(range(42), itertools.cycle(itertools.product((False, True), (False, True))))
]
EVERY = list(
    itertools.product(SHAPES, ("contiguous", "rows"), DTYPES, ACTIVATIONS, (False, True), (False, True))
)


def laid_out(t, layout):
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "rows" else t.contiguous()


def case(shape, layout, dtype, pool, added, device):
    """Random ``(x, weight, bias, residual, grad)``; the gradient is random too."""

    def draw(s, scale=1.0, shift=0.0):
        return (torch.randn(s, device=device) * scale + shift).to(dtype)

    x = laid_out(draw(shape, 2.0, 0.7), layout)
    residual = laid_out(draw(shape), layout) if added else None
    weight = torch.randn(shape[1], device=device)
    bias = torch.randn(shape[1], device=device)
    out = shape if pool is None else (*shape[:2], shape[2] // 2, shape[3] // 2)
    return x, weight, bias, residual, draw(out)


def check_step(gpu, torch_step, within_budget, shape, layout, dtype, activation, pool, added, device):
    x, weight, bias, residual, grad = case(shape, layout, dtype, pool, added, device)
    assert gpu.unsupported(x, residual, activation, pool) is None
    truth = torch_step(x, weight, bias, residual, grad, activation, pool)
    torchs = torch_step(x, weight.to(dtype), bias.to(dtype), residual, grad, activation, pool, double=False)
    out, mean, var, invstd = gpu.forward_train(x, weight, bias, residual, 1e-5, activation, pool)
    ours = gpu.backward(grad, x, mean, invstd, weight, bias, residual, activation, pool, added)
    assert out.dtype == dtype
    assert out.stride() == laid_out(out, layout).stride() or out.numel() == 0
    assert (ours[3] is None) != added
    names = ("out", "dx", "dweight", "dbias", "dresidual")
    for name, mine, theirs, true in zip(names, (out, *ours), torchs, truth, strict=False):
        within_budget(mine, theirs, true, torch.float32 if name in names[2:4] else dtype, name)
    axes = (0, *range(2, x.dim()))
    true_mean, true_var = x.double().mean(axes), x.double().var(axes, unbiased=False)
    torch.testing.assert_close(mean.double(), true_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), true_var, rtol=2e-6, atol=0)
    torch.testing.assert_close(invstd.double(), (true_var + 1e-5).rsqrt(), rtol=2e-6, atol=0)
    again = gpu.forward(x, mean, invstd, weight, bias, residual, activation, pool)
    torch.testing.assert_close(again, out, rtol=0, atol=torch.finfo(dtype).eps * out.abs().max().item())


def runnable(shape, pooled):
    return not pooled or (len(shape) == 4 and min(shape[2:]) >= 2)


@pytest.mark.parametrize(
    ("shape", "layout", "dtype", "activation", "pooled", "added"),
    [c for c in SOME if runnable(c[0], c[4])],
)
def test_equals_float64(
    gpu, torch_step, within_budget, device, shape, layout, dtype, activation, pooled, added
):
    check_step(
        gpu, torch_step, within_budget, shape, layout, dtype, activation, 2 if pooled else None, added, device
    )


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(16))
@pytest.mark.parametrize("whole", [False, True])
def test_equals_float64_everywhere(gpu, cut, torch_step, within_budget, device, chunk, whole):
    cut(2, whole)
    for shape, layout, dtype, activation, pooled, added in EVERY[chunk::16]:
        if runnable(shape, pooled):
            pool = 2 if pooled else None
            check_step(gpu, torch_step, within_budget, shape, layout, dtype, activation, pool, added, device)


@pytest.mark.parametrize("pool", [None, 2])
@pytest.mark.parametrize("layout", ["contiguous", "rows"])
@pytest.mark.parametrize("multiprocessors", [1, 16])
def test_split_reductions(gpu, cut, torch_step, within_budget, device, multiprocessors, layout, pool):
    """Few splits of several tiles, and as many as there are tiles: the merge weighs each by its count."""
    from gammabeta.kernels.gpu import plan

    cut(multiprocessors, False)
    shape = (6, 2, 30, 31)
    view = plan.view_of(shape, layout == "rows", pool, 4)
    assert plan.splits(plan.tile(view, 2, True), plan.Chip(multiprocessors, 0)) > 1
    check_step(gpu, torch_step, within_budget, shape, layout, torch.float32, "relu", pool, True, device)


@pytest.mark.parametrize("layout", ["contiguous", "rows"])
@pytest.mark.parametrize("whole", [False, True])
def test_large_mean_small_deviation(gpu, cut, device, layout, whole):
    """Mean 1e4, standard deviation 1e-2: the variance of what float32 holds, to 1e-4."""
    cut(4, whole)
    x = laid_out(1e4 + 1e-2 * torch.randn(16, 3, 24, 24, device=device), layout)
    mean, var = gpu.statistics(x)
    axes = (0, 2, 3)
    torch.testing.assert_close(mean.double(), x.double().mean(axes), rtol=6e-8, atol=0)
    torch.testing.assert_close(var.double(), x.double().var(axes, unbiased=False), rtol=1e-4, atol=0)


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
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3), unbiased=False), rtol=1e-5, atol=0)


@pytest.mark.filterwarnings(
    "ignore:invalid value"
)  # the interpreter computes with NumPy, which remarks on it
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_input_spoils_its_channel_only(gpu, device, value):
    x = torch.randn(4, 3, 5, 5, device=device)
    x[1, 1, 2, 2] = value
    out, mean, var, _ = gpu.forward_train(x, None, None, None, 1e-5, "relu", None)
    torch.testing.assert_close(mean[1], x[:, 1].mean(), equal_nan=True)
    assert var[1].isnan()
    assert out[:, 1].isnan().all(), "NaN must pass through the activation, as torch's does"
    assert out[:, ::2].isfinite().all()


def test_without_affine(gpu, torch_step, within_budget, device):
    x, _, _, _, grad = case((3, 4, 5, 6), "contiguous", torch.float32, None, False, device)
    ones, zeros = torch.ones(4, device=device), torch.zeros(4, device=device)
    out, mean, _, invstd = gpu.forward_train(x, None, None, None, 1e-5, "silu", None)
    ours = gpu.backward(grad, x, mean, invstd, None, None, None, "silu", None, False)
    truth = torch_step(x, ones, zeros, None, grad, "silu", None)
    for mine, true in zip((out, *ours[:3]), truth, strict=True):
        within_budget(mine, true, true, torch.float32)


@pytest.mark.parametrize("pool", [None, 2])
@pytest.mark.parametrize("layout", ["contiguous", "rows"])
def test_backward_in_two_parts(gpu, device, layout, pool):
    """Reduce, then apply with the means: the same as the two in one; SyncBatchNorm needs the parts."""
    x, weight, bias, residual, grad = case((3, 4, 7, 6), layout, torch.float32, pool, True, device)
    _, mean, _, invstd = gpu.forward_train(x, weight, bias, residual, 1e-5, "gelu", pool)
    call = (grad, x, mean, invstd, weight, bias, residual, "gelu", pool)
    dx, dweight, dbias, dresidual = gpu.backward(*call, True)
    sum_dz, sum_dz_xhat = gpu.backward_reduce(*call)
    count = x.numel() // 4
    parts = gpu.backward_apply(*call, sum_dz / count, sum_dz_xhat / count, True)
    for mine, whole in zip((*parts, sum_dz_xhat, sum_dz), (dx, dresidual, dweight, dbias), strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-5, atol=1e-5)


def test_evaluation_backward(gpu, torch_step, device):
    """With given statistics both means are zero: dx is dz times weight * invstd."""
    x, weight, bias, _, grad = case((3, 4, 6), "contiguous", torch.float32, None, False, device)
    mean, invstd = torch.randn(4, device=device), torch.rand(4, device=device) + 0.5
    leaf = x.double().requires_grad_()
    shape = (1, -1, 1)
    z = (leaf - mean.view(shape)) * invstd.view(shape) * weight.view(shape) + bias.view(shape)
    (true,) = torch.autograd.grad(torch.nn.functional.hardswish(z), leaf, grad.double())
    zero = torch.zeros(4, device=device)
    dx, none = gpu.backward_apply(
        grad, x, mean, invstd, weight, bias, None, "hardswish", None, zero, zero, False
    )
    assert none is None
    torch.testing.assert_close(dx.double(), true, rtol=1e-5, atol=1e-5)


def test_any_memory_layout(gpu, torch_step, within_budget, device):
    """Slices, expanded gradients and companions in another layout are read rightly."""
    wide = torch.randn(4, 6, 9, 8, device=device)
    x, residual = wide[:, ::2, 1:, ::2], laid_out(torch.randn(4, 3, 8, 4, device=device), "rows")
    weight, bias = torch.randn(3, device=device), torch.randn(3, device=device)
    grad = torch.randn(4, 3, 1, 1, device=device).expand(4, 3, 8, 4)
    truth = torch_step(x, weight, bias, residual, grad, "relu", None)
    out, mean, _, invstd = gpu.forward_train(x, weight, bias, residual, 1e-5, "relu", None)
    ours = gpu.backward(grad, x, mean, invstd, weight, bias, residual, "relu", None, True)
    for mine, true in zip((out, *ours), truth, strict=True):
        within_budget(mine, true, true, torch.float32)


@pytest.mark.parametrize("layout", ["contiguous", "rows"])
def test_same_bits_each_time(gpu, cut, device, layout):
    cut(3, False)
    x, weight, bias, residual, grad = case((4, 5, 16, 20), layout, torch.bfloat16, None, True, device)
    runs = []
    for _ in range(2):
        out, mean, var, invstd = gpu.forward_train(x, weight, bias, residual, 1e-5, "relu", None)
        found = gpu.backward(grad, x, mean, invstd, weight, bias, residual, "relu", None, True)
        runs.append((out, mean, var, invstd, *found))
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
    counted = gpu.update_running(running_mean, running_var, mean, var, 11, 0.1, skip)
    refused = skip and bad is not None
    assert bool(counted) is not refused
    assert counted is True or counted.dtype is torch.bool
    expected = before if refused else (0.9 * before[0] + 0.1 * mean, 0.9 * before[1] + 0.1 * var * 11 / 10)
    torch.testing.assert_close((running_mean, running_var), expected, equal_nan=True)


@pytest.mark.parametrize("shares", [(5, 3), (7, 1)])
def test_shares_of_a_batch_equal_the_whole(gpu, device, shares):
    """What SyncBatchNorm does on GPUs: statistics and sums by share, merged; the rest by share."""
    x, weight, bias, residual, grad = case((8, 4, 6, 5), "rows", torch.float32, None, True, device)
    out, mean, var, invstd = gpu.forward_train(x, weight, bias, residual, 1e-5, "silu", None)
    whole = gpu.backward(grad, x, mean, invstd, weight, bias, residual, "silu", None, True)
    parts = [tuple(t.split(shares)[i] for t in (x, residual, grad)) for i in range(2)]
    found = [gpu.statistics(p[0]) for p in parts]
    share = torch.tensor(shares, device=device).double()[:, None] / 8
    means, variances = (torch.stack([f[i] for f in found]).double() for i in range(2))
    centre = (share * means).sum(0)
    spread = (share * (variances + (means - centre) ** 2)).sum(0)
    torch.testing.assert_close((centre.float(), spread.float()), (mean, var), rtol=1e-6, atol=1e-6)
    given = centre.float(), (spread + 1e-5).rsqrt().float(), weight, bias
    sums = [gpu.backward_reduce(g, p, *given, r, "silu", None) for p, r, g in parts]
    means_dz = [(sums[0][i] + sums[1][i]) / (x.numel() // 4) for i in range(2)]
    for i, (p, r, g) in enumerate(parts):
        mine = gpu.forward(p, *given, r, "silu", None)
        dx, dresidual = gpu.backward_apply(g, p, *given, r, "silu", None, *means_dz, True)
        theirs = (t.split(shares)[i] for t in (out, whole[0], whole[3]))
        for a, b in zip((mine, dx, dresidual), theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
