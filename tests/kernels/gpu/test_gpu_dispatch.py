"""The Triton backend behind ``functional.batch_norm``: one rule, and clear words where it cannot run."""

import os
import subprocess
import sys

import pytest
import torch

import gammabeta as gb


def step(backend, x, residual, training, activation, pool, device):
    """Output, gradients under a fixed random upstream, and running statistics."""
    channels = x.shape[1]
    generator = torch.Generator().manual_seed(3)
    weight = (torch.rand(channels, generator=generator) + 0.5).to(device).requires_grad_()
    bias = torch.randn(channels, generator=generator).to(device).requires_grad_()
    running = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    leaves = [t.detach().clone().requires_grad_() for t in (x, residual) if t is not None]
    out = gb.functional.batch_norm(
        leaves[0],
        *running,
        weight,
        bias,
        training,
        0.3,
        1e-5,
        activation=activation,
        residual=leaves[1] if residual is not None else None,
        pool=pool,
        backend=backend,
    )
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad(out, [*leaves, weight, bias], upstream), *running]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("activation", "pool", "added"), [("relu", None, True), ("silu", 2, False)])
def test_same_as_torchs_road(gpu, device, training, channels_last, activation, pool, added):
    x = torch.randn(4, 3, 6, 7, device=device)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    residual = torch.randn_like(x) if added else None
    ours = step("gpu", x, residual, training, activation, pool, device)
    torchs = step("torch", x, residual, training, activation, pool, device)
    torch.testing.assert_close(ours, torchs, rtol=2e-5, atol=2e-5)


@pytest.mark.filterwarnings(
    "ignore:invalid value"
)  # the interpreter computes with NumPy, which remarks on it
def test_infinities_do_not_poison_the_running_statistics(gpu, device):
    """A step whose input overflowed in float16: refused on the device, without the host waiting to know."""
    x = torch.randn(8, 3, 4, 4, device=device).half()
    x[0, 1] = float("inf")
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    gb.functional.batch_norm(x, mean, var, None, None, True, 0.1, backend="gpu", skip_nonfinite=True)
    assert torch.equal(mean, torch.zeros(3, device=device))
    assert torch.equal(var, torch.ones(3, device=device))


def test_explain_names_it(gpu, device):
    x = torch.randn(2, 3, 4, 4, device=device)
    running = torch.zeros(3, device=device), torch.ones(3, device=device)
    found = gb.functional.explain(x, *running, backend="gpu")
    assert found.path == "gpu"
    assert "Triton" in found.reason
    with pytest.raises(gb.errors.UnavailableError, match="float64"):
        gb.functional.explain(x.double(), *running, backend="gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU says")
def test_asked_for_where_there_is_no_gpu():
    """One line: which, why, what to do. With auto nothing is said and nothing fails."""
    code = (
        "import torch, gammabeta as gb\n"
        "x = torch.randn(2, 3, 4, 4)\n"
        "gb.functional.batch_norm(x, None, None, training=True)\n"
        "try:\n"
        "    gb.functional.batch_norm(x, None, None, training=True, backend='gpu')\n"
        "except gb.errors.UnavailableError as error:\n"
        "    print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    said = done.stdout.strip()
    assert "\n" not in said
    assert said.startswith("backend='gpu' cannot run this call: ")
    assert "CUDA" in said
    assert said.endswith("use backend='auto'")


def test_asked_for_without_triton():
    code = (
        "import sys\nsys.modules['triton'] = None\n"
        "import torch, gammabeta as gb\n"
        "try:\n"
        "    gb.functional.batch_norm(torch.randn(4, 3), None, None, training=True, backend='gpu')\n"
        "except gb.errors.UnavailableError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Triton is not installed (pip install triton)" in done.stdout
