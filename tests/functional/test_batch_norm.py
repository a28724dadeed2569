"""``functional.batch_norm`` beside ``torch.nn.functional``, on every path."""

import pytest
import torch
import torch.nn.functional as F

import gammabeta as gb
from gammabeta.epilogue import Epilogue
from gammabeta.functional import step
from gammabeta.kernels.backend import Call, Running

batch_norm = gb.functional.batch_norm
BACKENDS = ["auto", "cpu", "torch"]


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


LAYOUTS = {
    "contiguous": lambda: torch.randn(5, 3, 6, 7),
    "channels_last": lambda: channels_last(torch.randn(5, 3, 6, 7)),
    "transposed": lambda: torch.randn(5, 3, 6, 7).transpose(2, 3),
    "sliced": lambda: torch.randn(5, 6, 12, 7)[:, ::2, ::2],
    "expanded": lambda: torch.randn(1, 3, 6, 7).expand(5, 3, 6, 7),
    "one channel": lambda: torch.randn(5, 1, 6, 7),
    "one pixel": lambda: torch.randn(5, 3, 1, 1),
    "one image": lambda: torch.randn(1, 3, 6, 7),
    "two values": lambda: torch.randn(2, 3),
    "matrix": lambda: torch.randn(9, 17),
    "sequence": lambda: torch.randn(4, 3, 8),
    "sequence, channels last": lambda: torch.randn(4, 8, 3).transpose(1, 2),
    "volume": lambda: torch.randn(3, 4, 2, 3, 5),
    "volume, channels last": lambda: torch.randn(3, 4, 2, 3, 5).contiguous(
        memory_format=torch.channels_last_3d
    ),
    "six dimensions": lambda: torch.randn(2, 3, 2, 2, 2, 3),
}


def statistics(channels, dtype=torch.float32):
    return torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype) + 0.5


def outcome(function, x, extra, training, seed=0):
    """Output, gradients and running statistics of one call with a random upstream gradient."""
    torch.manual_seed(seed)
    mean, var = statistics(x.shape[1])
    leaves = [x.detach().requires_grad_(), *(t.requires_grad_() for t in statistics(x.shape[1]))]
    inputs = list(leaves)
    if extra is not None:
        inputs.append(extra.detach().requires_grad_())
    out = function(inputs[0], mean, var, *inputs[1:3], training, *inputs[3:])
    grads = torch.autograd.grad(out, inputs, torch.randn(out.shape, dtype=out.dtype))
    return [out, *grads, mean, var]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend, training):
    x = LAYOUTS[layout]()
    ours = outcome(lambda x, m, v, w, b, t: batch_norm(x, m, v, w, b, t, backend=backend), x, None, training)
    theirs = outcome(F.batch_norm, x, None, training)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    residual = torch.randn(x.shape)
    ours = outcome(
        lambda x, m, v, w, b, t, r: batch_norm(
            x, m, v, w, b, t, activation="relu", residual=r, backend=backend
        ),
        x,
        residual,
        training,
    )
    theirs = outcome(
        lambda x, m, v, w, b, t, r: F.relu(F.batch_norm(x, m, v, w, b, t) + r), x, residual, training
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 4, 6, 6), (3, 4, 7, 5), (2, 3, 2, 2)])
def test_pool(shape, backend, training):
    for x in (torch.randn(shape), channels_last(torch.randn(shape))):
        ours = outcome(
            lambda x, m, v, w, b, t: batch_norm(x, m, v, w, b, t, activation="relu", pool=2, backend=backend),
            x,
            None,
            training,
        )
        theirs = outcome(
            lambda x, m, v, w, b, t: F.avg_pool2d(F.relu(F.batch_norm(x, m, v, w, b, t)), 2),
            x,
            None,
            training,
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [(3, 2, 1), (20, 5, 10)])
def test_max_pool(window, backend, training, monkeypatch):
    monkeypatch.setattr("gammabeta.functional.step.SMALL_TRAIN", [0, 0, 0])
    if window == (20, 5, 10) and backend == "cpu":
        pytest.skip("a window of 400 elements is torch's")
    pool = gb.functional.MaxPool(*window)
    for x in (torch.randn(3, 4, 11, 13), channels_last(torch.randn(3, 4, 11, 13))):
        ours = outcome(
            lambda x, m, v, w, b, t: batch_norm(
                x, m, v, w, b, t, activation="relu", pool=pool, backend=backend
            ),
            x,
            None,
            training,
        )
        theirs = outcome(
            lambda x, m, v, w, b, t: F.max_pool2d(F.relu(F.batch_norm(x, m, v, w, b, t)), *window),
            x,
            None,
            training,
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_other_dtypes(dtype, training):
    x = torch.randn(6, 3, 5, 5).to(dtype)
    kind = dtype if dtype is torch.float64 else torch.float32
    mean, var = statistics(3, kind)
    weight, bias = statistics(3, kind)
    ours, theirs = (mean.clone(), var.clone()), (mean.clone(), var.clone())
    out = batch_norm(x, *ours, weight, bias, training, activation="silu")
    expected = F.silu(F.batch_norm(x, *theirs, weight, bias, training))
    assert out.dtype is dtype
    tolerance = {torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours, theirs)


def test_bfloat16_kernel_with_parameters_of_both_kinds():
    x = torch.randn(8, 4, 6, 6).bfloat16()
    for kind in (torch.float32, torch.bfloat16):
        state = [t.to(kind) for t in (*statistics(4), *statistics(4))]
        twin = [t.clone() for t in state]
        leaves = [t.requires_grad_() for t in (x.clone(), state[2], state[3])]
        out = batch_norm(leaves[0], *state[:2], *leaves[1:], True, backend="cpu")
        theirs = [t.requires_grad_() for t in (x.clone(), twin[2], twin[3])]
        expected = F.batch_norm(theirs[0], *twin[:2], *theirs[1:], True)
        grad = torch.randn(out.shape).bfloat16()
        found = [out, *torch.autograd.grad(out, leaves, grad), *state[:2]]
        wanted = [expected, *torch.autograd.grad(expected, theirs, grad), *twin[:2]]
        assert [t.dtype for t in found] == [t.dtype for t in wanted]
        torch.testing.assert_close(found, wanted, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("needs", ["x", "weight", "bias", "residual", "none"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "extras", [{}, {"activation": "relu"}, {"activation": "relu", "pool": 2}, {"pool": 2}]
)
def test_gradients_for_some_inputs_only(needs, training, extras):
    x, residual = torch.randn(4, 3, 6, 6), torch.randn(4, 3, 6, 6)
    weight, bias = statistics(3)
    inputs = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    results = []
    for backend in ("cpu", "torch"):
        leaves = {name: t.clone().requires_grad_(name == needs) for name, t in inputs.items()}
        mean, var = torch.zeros(3), torch.ones(3)
        out = batch_norm(
            leaves["x"],
            mean,
            var,
            leaves["weight"],
            leaves["bias"],
            training,
            residual=leaves["residual"],
            backend=backend,
            **extras,
        )
        assert out.requires_grad == (needs != "none")
        if needs == "none":
            results.append([out])
            continue
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        results.append([out, torch.autograd.grad(out, leaves[needs], grad)[0]])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def wrong_calls():
    x = torch.randn(4, 3, 5, 5)
    c = lambda n: torch.ones(n)  # noqa: E731
    return {
        "running_mean": (x, c(2), c(3)),
        "running_var": (x, c(3), c(4)),
        "weight": (x, c(3), c(3), c(1)),
        "bias": (x, c(3), c(3), c(3), c(6)),
        "no statistics": (x, None, None),
        "half statistics": (x, c(3), None, None, None, True),
        "one value": (x[:1, :, :1, :1], c(3), c(3), None, None, True),
        "eps": (x, c(3), c(3), None, None, True, 0.1, 0.0),
        "eps in evaluation": (x, c(3), c(3), None, None, False, 0.1, -1.0),
        "momentum": (x, c(3), c(3), None, None, True, None),
        "one dimension": (x[0, 0, 0], c(5), c(5)),
        "double parameters": (x, c(3).double(), c(3).double(), None, None, True),
        "two-dimensional": (x, c(3).view(3, 1), c(3).view(1, 3), None, None, True),
        "no channels, affine": (x[:, :0], c(0), c(0), c(0), c(0)),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", wrong_calls())
def test_torch_s_own_errors(case, backend):
    call = wrong_calls()[case]
    try:
        F.batch_norm(*call)
        expected = None
    except Exception as error:
        expected = error
    if expected is None and torch.__version__ < "2.7":
        pytest.skip("this PyTorch accepts the call")
    with pytest.raises(type(expected)) as caught:
        batch_norm(*call, backend=backend)
    assert str(caught.value) == str(expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (4, 0, 4, 4), (4, 3, 0, 4), (0, 3), (0, 0)])
def test_empty_inputs(shape, backend):
    x = torch.randn(shape, requires_grad=True)
    c = shape[1]
    out = batch_norm(x, torch.zeros(c), torch.ones(c), training=True, activation="relu", backend=backend)
    assert out.shape == shape
    out.sum().backward()
    assert x.grad.shape == shape


def test_residual_that_broadcasts_promotes_or_is_a_number():
    x = torch.randn(4, 3, 5, 5)
    mean, var = statistics(3)
    plain = F.batch_norm(x, mean, var)
    for residual in (
        torch.randn(4, 3, 1, 1),
        torch.randn(4, 3, 5, 5).double(),
        2,
        torch.randn(2, 4, 3, 5, 5),
    ):
        out = batch_norm(x, mean, var, residual=residual)
        torch.testing.assert_close(out, plain + residual)


def test_refusals_of_our_own():
    x, (mean, var) = torch.randn(4, 3, 5, 5), statistics(3)
    for settings, words in (
        ({"activation": "nonsense"}, "hardswish"),
        ({"pool": 3}, "2x2"),
        ({"pool": gb.functional.MaxPool(3, 2, 2)}, "half the kernel"),
        ({"pool": gb.functional.MaxPool(3, 0)}, "at least 1"),
        ({"pool": gb.functional.MaxPool(2.0, 2)}, "kernel=2.0"),
        ({"backend": "cuda"}, "auto, cpu, gpu, torch"),
    ):
        with pytest.raises(gb.errors.UsageError, match=words):
            batch_norm(x, mean, var, **settings)
    for pool in (2, gb.functional.MaxPool(2, 2)):
        with pytest.raises(gb.errors.UsageError, match="4D"):
            batch_norm(x[..., 0], mean, var, pool=pool)
    with pytest.raises(RuntimeError, match="too small"):  # torch's own error
        batch_norm(x, mean, var, pool=gb.functional.MaxPool(6, 1))


def test_a_named_backend_runs_or_says_why_not():
    mean, var = statistics(3, torch.float64)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    with pytest.raises(gb.errors.UnavailableError, match="float64"):
        batch_norm(x, mean, var, backend="cpu")
    x, mean, var = x.float(), mean.float(), var.float()
    with pytest.raises(gb.errors.UnavailableError, match="residual"):
        batch_norm(x, mean, var, residual=x[:1], backend="cpu")


def test_explain():
    big = torch.randn(64, 16, 32, 32)
    mean, var = statistics(16)
    explain = gb.functional.explain
    assert str(explain(big, mean, var, training=True)).startswith("cpu: the fused Numba kernels")
    assert explain(big[:1, :, :2, :2], mean, var).reason.startswith("a small input")
    assert "float64" in explain(big.double(), mean.double(), var.double(), training=True).reason
    assert "asked for" in explain(big, mean, var, backend="torch").reason
    assert "refuses" in explain(big, mean[:3], var, training=True, backend="cpu").reason
    with torch.autograd.forward_ad.dual_level():
        assert "forward-mode" in explain(big, mean, var, training=True).reason
    with pytest.raises(gb.errors.UnavailableError):
        explain(big.double(), mean.double(), var.double(), backend="cpu")
    before = mean.clone()
    explain(big, mean, var, training=True)
    torch.testing.assert_close(mean, before)


def test_skip_nonfinite():
    for size in (4, 64):
        x = torch.randn(size, 3, 24, 24)
        x[0, 1, 2, 3] = float("nan")
        for backend in BACKENDS:
            mean, var = statistics(3)
            before = mean.clone(), var.clone()
            batch_norm(x, mean, var, training=True, backend=backend, skip_nonfinite=True)
            torch.testing.assert_close((mean, var), before, rtol=0, atol=0)
            batch_norm(x, mean, var, training=True, backend=backend)
            assert mean[1].isnan()
            assert mean[0].isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_as_torch(backend):
    x, (mean, var) = torch.randn(4, 3, 6, 6), statistics(3)
    weight, bias = statistics(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for value in (x, x.bfloat16()):
            out = batch_norm(value, mean.clone(), var.clone(), weight, bias, True, backend=backend)
            expected = F.batch_norm(value, mean.clone(), var.clone(), weight, bias, True)
            assert out.dtype is expected.dtype
            torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def test_deterministic():
    x = torch.randn(32, 16, 20, 20, requires_grad=True)
    grad = torch.randn(32, 16, 20, 20)
    results = []
    for _ in range(3):
        out = batch_norm(x, None, None, training=True, activation="relu", backend="cpu")
        results.append((out, *torch.autograd.grad(out, x, grad)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


def test_only_the_input_and_channels_are_kept():
    """Between forward and backward: x, five vectors; not the output, not a mask."""
    x = torch.randn(16, 8, 32, 32, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        weight, bias = (t.requires_grad_() for t in statistics(8))
        batch_norm(x, None, None, weight, bias, True, activation="relu", backend="cpu")
    assert sorted(sizes) == [8, 8, 8, 8, x.numel()]


def test_an_activation_with_numbers_follows_the_kernels_of_a_gpu():
    """It is left to torch's operator there, with the pool behind it; the residual is not."""
    x = torch.randn(4, 3, 8, 8, device="meta")
    epilogue = Epilogue("elu(0.5)", 2)
    call = Call(x, None, None, x, epilogue, 1e-5)
    found = step.route(call, Running(None, None), True, "auto")
    assert found.call.epilogue == Epilogue()
    assert found.left == epilogue
    on_cpu = Call(torch.randn(4, 3, 8, 8), None, None, None, epilogue, 1e-5)
    assert step.route(on_cpu, Running(None, None), True, "auto").call.epilogue == epilogue


def test_what_is_left_is_computed():
    """As on a GPU, by its backend in Triton's interpreter."""
    pytest.importorskip("gammabeta.kernels.gpu.host")
    x, grads = torch.randn(4, 3, 8, 8), []
    for backend in ("gpu", "torch"):
        leaf = x.clone().requires_grad_()
        out = gb.functional.batch_norm(
            leaf, None, None, training=True, activation="elu(0.5)", residual=x, pool=2, backend=backend
        )
        grads.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
