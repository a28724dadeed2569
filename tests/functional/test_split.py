"""The pieces put together are the whole."""

import pytest
import torch

import gammabeta as gb
from gammabeta.functional.split import like, pieces


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("activation", "pool"), [(None, None), ("relu", 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pieces(layout, activation, pool, dtype):
    x, residual = (torch.randn(6, 3, 8, 8, dtype=dtype).contiguous(memory_format=layout) for _ in range(2))
    kind = torch.float64 if dtype is torch.float64 else torch.float32
    weight, bias = torch.rand(3, dtype=kind) + 0.5, torch.randn(3, dtype=kind)
    kernel, x, residual = pieces(x, residual, activation, pool)
    mean, var = kernel.statistics(x)
    invstd = (var + 1e-5).rsqrt()
    out = kernel.forward(x, mean, invstd, weight, bias, residual, activation, pool)
    grad = like(torch.randn(out.shape, dtype=dtype), x)
    call = (grad, x, mean, invstd, weight, bias, residual, activation, pool)
    sums = kernel.backward_reduce(*call)
    count = x.numel() // 3
    dx, dresidual = kernel.backward_apply(*call, *(s / count for s in sums), True)

    exact = [t.double().requires_grad_() for t in (x, weight, bias, residual)]
    expected = gb.functional.batch_norm(
        exact[0], None, None, *exact[1:3], True, activation=activation, residual=exact[3], pool=pool
    )
    grads = torch.autograd.grad(expected, exact, grad.double())
    found = [t.double() for t in (out, dx, sums[1], sums[0], dresidual)]
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(found, [expected, *grads], rtol=tolerance, atol=tolerance * 4)


def test_pieces_of_a_named_backend():
    with pytest.raises(gb.errors.UnavailableError, match="float64"):
        pieces(torch.randn(4, 3, dtype=torch.float64), backend="cpu")
    assert pieces(torch.randn(4, 3), backend="cpu")[0].__name__ == "gammabeta.kernels.cpu"
    assert pieces(torch.randn(4, 3, dtype=torch.float64))[0].__name__ == "gammabeta.functional.plain"
