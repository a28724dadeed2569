"""``batch_norm``, with torch's signature and what follows it; ``explain`` says which path a call takes."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..epilogue import ACTIVATIONS, NOTHING, MaxPool, Pool, epilogue_of
from ..kernels.backend import Call, Running, label_of
from . import library as library
from . import masked
from .step import check_call, evaluate, is_small, route, train

__all__ = ["ACTIVATIONS", "Explanation", "MaxPool", "batch_norm", "explain"]


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    pool: Pool = None,
    backend: str = "auto",
    skip_nonfinite: bool = False,
    mask: Tensor | None = None,
    lengths: Any = None,
) -> Tensor:
    """Batch normalization, and what follows it, in one pass: ``pool(activation(bn(x) + residual))``.

    The first eight arguments are those of ``torch.nn.functional.batch_norm``, with the same meaning, the
    same errors and the same derivatives. The others change nothing unless given. In training the batch is
    normalised with its own mean and *biased* variance; the running variance takes the *unbiased* one.

    Args:
        x: ``(N, C, *spatial)``, any floating dtype; kernels serve float32 and bfloat16 (on a GPU float16
            too), torch's operators serve all others.
        running_mean: ``(C,)``; updated in place in training, used in evaluation. None: not kept.
        running_var: ``(C,)``, unbiased; likewise.
        weight: ``(C,)``, gamma, or None for one.
        bias: ``(C,)``, beta, or None for zero.
        training: normalise with the batch's statistics instead of the running ones.
        momentum: weight of the *new* value in the running statistics.
        eps: added to the variance.
        activation: None, or a name in the table ``ACTIVATIONS``: "relu", "silu", "leaky_relu" (slope 0.01),
            "leaky_relu(0.2)", "gelu" (exact) and others.
        residual: added before the activation; the shape of ``x``, or one that broadcasts with it.
        pool: None; or 2: the mean over 2x2 windows, a last odd row or column dropped, as by
            ``avg_pool2d(out, 2)``; or ``MaxPool(kernel, stride, padding)``, as ``max_pool2d``.
        backend: "auto", or one by name: "cpu" (Numba), "gpu" (Triton), "torch", or one that was registered.
        skip_nonfinite: leave the running statistics as they are when the batch's hold an infinity or NaN.
        mask: bool ``(N, *spatial)``, True where there is a value, False where there is padding. Statistics,
            gradients and running values are those of the values alone; at padding, whatever it holds, the
            output and the gradient are 0. If nothing is kept, nothing is counted.
        lengths: the same for sequences ``(N, C, L)``: N whole numbers, how many values come first in each.

    Returns:
        ``(N, C, *spatial)``, smaller by ``pool``, in the memory layout of ``x``.

    Raises:
        UsageError: an activation, pool or backend that does not exist; a mask that does not fit, or with a
            pool.
        UnavailableError: the backend named cannot serve this call; the message says why.
        ValueError, RuntimeError: what torch raises for the same arguments.

    Ioffe and Szegedy 2015, Algorithm 1.
    """
    if has_torch_function_variadic(x, running_mean, running_var, weight, bias, residual):
        tensors = (x, running_mean, running_var, weight, bias)
        out: Tensor = handle_torch_function(
            batch_norm,
            (*tensors, residual),
            *tensors,
            training=training,
            momentum=momentum,
            eps=eps,
            activation=activation,
            residual=residual,
            pool=pool,
            backend=backend,
            skip_nonfinite=skip_nonfinite,
            mask=mask,
            lengths=lengths,
        )
        return out
    epilogue = NOTHING
    if activation is not None or pool is not None:
        epilogue = epilogue_of(activation, pool)
    if pool is not None or backend != "auto":
        check_call(x, pool, backend)
    call = Call(x, weight, bias, residual, epilogue, eps)
    if mask is not None or lengths is not None:
        kept = masked.mask_of(x, mask, lengths, pool)
        if training:
            running = Running(running_mean, running_var, momentum, skip_nonfinite)
            return masked.train(call, running, kept, backend)[0]
        return masked.evaluate(call, running_mean, running_var, kept, backend)
    if training:
        return train(call, Running(running_mean, running_var, momentum, skip_nonfinite), backend)[0]
    return evaluate(call, running_mean, running_var, backend)


@dataclass(frozen=True)
class Explanation:
    """Which path a call takes: ``path`` is ``"torch"`` or a backend's name, ``reason`` a sentence."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def explain(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    pool: Pool = None,
    backend: str = "auto",
) -> Explanation:
    """Say which path ``batch_norm`` takes for the same arguments, and why; nothing is computed.

    Returns:
        An ``Explanation``; ``str()`` of it is one line.

    Raises:
        UsageError, UnavailableError: as ``batch_norm``.
    """
    check_call(x, pool, backend)
    call = Call(x, weight, bias, residual, epilogue_of(activation, pool), eps)
    if backend == "auto" and is_small(call, training):
        return Explanation("torch", "a small input: torch's operators are quicker than a kernel's call")
    found = route(call, Running(running_mean, running_var, momentum), training, backend)
    if found.kind != "kernels":
        return Explanation("torch", found.reason)
    apart = f"; {found.left} by torch's operators" if found.left != NOTHING else ""
    return Explanation(found.name, f"{label_of(found.name)}; {found.reason}{apart}")
