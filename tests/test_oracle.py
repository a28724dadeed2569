"""The oracle lets right results pass and no wrong one: it is what every kernel is judged by."""

import pytest
import torch

from gammabeta.epilogue import Epilogue, MaxPool, Pool, pooled_shape
from gammabeta.kernels import tensors
from gammabeta.kernels.backend import Call
from tests import oracle


def problem(pool: Pool, dtype: torch.dtype) -> tuple[Call, torch.Tensor]:
    x, residual = (torch.randn(4, 3, 7, 6).to(dtype) for _ in range(2))
    call = Call(x, torch.rand(3) + 0.5, torch.randn(3), residual, Epilogue("silu", pool), 1e-5)
    return call, torch.randn(pooled_shape(x.shape, pool)).to(dtype)


@pytest.mark.parametrize("given", [None, (torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 3.0]))])
@pytest.mark.parametrize("pool", [None, 2, MaxPool(3, 2, 1)])
def test_torch_in_float64_agrees(pool: Pool, given: oracle.Statistics | None) -> None:
    call, grad = problem(pool, torch.float32)
    wide = None if given is None else (given[0].double(), given[1].double())
    found = oracle.by_torch(oracle.exact(call), grad.double(), wide)
    torch.testing.assert_close(found, oracle.truth(call, grad, given), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("field", oracle.Outcome._fields)
def test_one_wrong_element_is_enough(field: str, dtype: torch.dtype) -> None:
    call, grad = problem(None, dtype)
    found, _ = oracle.by_kernels(tensors, call, grad)
    oracle.assert_outcome(found, call, grad)
    right = getattr(found, field)
    for wrong in (right.abs().max() * 0.05, float("nan")):
        spoilt = right.clone()
        spoilt.view(-1)[1] += wrong
        with pytest.raises(AssertionError, match=f"{field}: error"):
            oracle.assert_outcome(found._replace(**{field: spoilt}), call, grad)
    with pytest.raises(AssertionError, match=field):
        oracle.assert_outcome(found._replace(**{field: right[:1]}), call, grad)


def test_a_gradient_nobody_asked_for_is_noticed() -> None:
    call, grad = problem(None, torch.float32)
    call = call._replace(residual=None)
    found, _ = oracle.by_kernels(tensors, call, grad)
    oracle.assert_outcome(found, call, grad)
    with pytest.raises(AssertionError, match="nobody asked for"):
        oracle.assert_outcome(found._replace(dresidual=grad), call, grad)


def test_the_budget_is_twice_torchs_error_and_a_floor() -> None:
    true, torchs = torch.tensor([1.0, 4.0]).double(), torch.tensor([1.0, 4.5])
    for off, floor, fits in ((0.99, 0.0, True), (1.01, 0.0, False), (1.3, 0.1, True), (1.5, 0.1, False)):
        found = torch.tensor([1.0, 4.0 - off])
        if fits:
            oracle.assert_within(found, true, torchs, floor=floor)
        else:
            with pytest.raises(AssertionError, match="budget"):
                oracle.assert_within(found, true, torchs, floor=floor)
