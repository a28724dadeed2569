"""What a call of batch normalization should give, and how far a result may be from it.

The truth is ``gammabeta.reference`` in float64, on the call's inputs as they are rounded, with gradients by
autograd. One thing is torch's: the reference has no max pooling, so torch's ``max_pool2d`` in float64 follows
it. For second derivatives, differentiate ``batch_norm`` below twice; ``tests/test_reference.py`` checks those
of the reference with ``gradgradcheck``.

The error budget of a result is twice the error that torch makes in the same dtype, and a written floor.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gammabeta import reference
from gammabeta.epilogue import MaxPool
from gammabeta.kernels.backend import Call, Normalized

Statistics = tuple[Tensor, Tensor]  # mean and biased variance, given in evaluation


class Outcome(NamedTuple):
    """Output and gradients; None where the call has no such tensor."""

    out: Tensor
    dx: Tensor
    dweight: Tensor | None
    dbias: Tensor | None
    dresidual: Tensor | None


# --- one call, three times --------------------------------------------------------------------------------


def batch_norm(call: Call, given: Statistics | None = None) -> Tensor:
    """The call by the reference: in training, or in evaluation with the statistics given."""
    x, weight, bias, residual, (activation, pool), eps = call
    mean, var = given or (None, None)
    windows = isinstance(pool, MaxPool)
    out = reference.batch_norm(
        x, mean, var, weight, bias, given is None, eps=eps,
        activation=activation, residual=residual, pool=None if windows else pool,
    )  # fmt: skip
    return F.max_pool2d(out, *pool) if windows else out


def torch_batch_norm(call: Call, given: Statistics | None = None) -> Tensor:
    """The call by torch's operators."""
    mean, var = given or (None, None)
    z = F.batch_norm(call.x, mean, var, call.weight, call.bias, given is None, 0.0, call.eps)
    return call.epilogue.apply(z, call.residual)


def differentiate(
    function: Callable[[Call, Statistics | None], Tensor], call: Call, grad: Tensor, given: Statistics | None
) -> Outcome:
    """Output and gradients of a function of a call, for this upstream gradient."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in call[:4]]
    out = function(Call(*leaves, call.epilogue, call.eps), given)
    found = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], grad))
    return Outcome(out.detach(), *(None if t is None else next(found) for t in leaves))


def exact(call: Call) -> Call:
    """The same numbers in float64."""
    return Call(*(None if t is None else t.detach().double() for t in call[:4]), call.epilogue, call.eps)


def truth(call: Call, grad: Tensor, given: Statistics | None = None) -> Outcome:
    """The reference, in float64."""
    if given is not None:
        given = given[0].double(), given[1].double()
    return differentiate(batch_norm, exact(call), grad.double(), given)


def by_torch(call: Call, grad: Tensor, given: Statistics | None = None) -> Outcome:
    """torch, in the call's own dtypes."""
    return differentiate(torch_batch_norm, call, grad, given)


def by_kernels(kernels: Any, call: Call, grad: Tensor) -> tuple[Outcome, Normalized]:
    """A backend's training step, and what its backward pass was given."""
    codes = kernels.codes_of(call.x, call.epilogue.pool)
    out, mean, _, invstd = kernels.forward_train(call, codes)
    normalized = Normalized(call, mean, invstd, codes)
    return Outcome(out, *kernels.backward(grad, normalized, call.residual is not None)), normalized


def statistics(x: Tensor) -> Statistics:
    """Mean and biased variance of each channel, in float64."""
    found = reference.batch_statistics(x.double())
    return found.mean, found.var


# --- the budget -------------------------------------------------------------------------------------------

# Relative to the largest true value: one unit in the last place of what is stored, and for float32 the
# rounding of a sum of a few thousand terms.
FLOORS = {torch.float32: 4e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def largest(t: Tensor) -> float:
    """The greatest absolute value. Unlike a norm, it hides no single bad element."""
    return t.double().abs().max().item()


def root_mean_square(t: Tensor) -> float:
    """The norm, divided by the root of the number of elements."""
    return t.double().square().mean().sqrt().item()


def assert_within(
    found: Tensor,
    true: Tensor,
    torchs: Tensor | None = None,
    *,
    floor: float | None = None,
    scale: float | None = None,
    size: Callable[[Tensor], float] = largest,
    what: object = "",
) -> None:
    """``size(found - true)`` is at most twice torch's, and ``floor * scale``.

    Args:
        found: the result, in any dtype.
        true: the same in float64.
        torchs: torch's result; None where the floor has to be enough.
        floor: that of ``FLOORS`` if None.
        scale: what the floor is relative to; the size of the truth if None.
        size: how an error is measured.
        what: told if it is not so.
    """
    assert found.shape == true.shape, what
    floor = FLOORS[found.dtype] if floor is None else floor
    budget = floor * (size(true) if scale is None else scale)
    if torchs is not None:
        budget += 2 * size(torchs.double() - true)
    error = size(found.double() - true)
    assert error <= budget, f"{what}: error {error:.3g}, budget {budget:.3g}"  # NaN fails too


def assert_outcome(found: Outcome, call: Call, grad: Tensor, given: Statistics | None = None) -> None:
    """Output and every gradient of the call are within the budget."""
    true, torchs = truth(call, grad, given), by_torch(call, grad, given)
    for name, mine, exactly, theirs in zip(Outcome._fields, found, true, torchs, strict=True):
        if exactly is not None:
            assert_within(mine, exactly, theirs, what=name)
        elif name == "dresidual":
            assert mine is None, "a gradient that nobody asked for"
