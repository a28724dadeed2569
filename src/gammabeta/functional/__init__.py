"""``batch_norm``: checks, dispatch, the autograd rule, registration with ``torch.library``."""

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..kernels.layout import MaxPool, Pool
from . import library as library
from . import step
from .checks import check_extras
from .route import Explanation, explain

__all__ = ["Explanation", "MaxPool", "batch_norm", "explain"]


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
) -> Tensor:
    """Batch normalization, and what follows it, in one pass: ``pool(activation(bn(x) + residual))``.

    The first eight arguments are those of ``torch.nn.functional.batch_norm``, with the same meaning, the
    same errors and the same derivatives; the rest do nothing unless given. In training the batch is
    normalised with its own mean and *biased* variance; the running variance takes the *unbiased* one.

    Args:
        x: ``(N, C, *spatial)``, any floating dtype; kernels serve float32 and bfloat16 (on a GPU float16
            too), everything else takes torch's road.
        running_mean: ``(C,)``; updated in place in training, used in evaluation. None: not kept.
        running_var: ``(C,)``, unbiased; likewise.
        weight: ``(C,)``, gamma, or None for one.
        bias: ``(C,)``, beta, or None for zero.
        training: normalise with the batch's statistics instead of the running ones.
        momentum: weight of the *new* value in the running statistics.
        eps: added to the variance.
        activation: None, "relu", "relu6", "leaky_relu" (slope 0.01), "silu", "hardswish" or "gelu" (exact).
        residual: added before the activation; the shape of ``x``, or one that broadcasts with it.
        pool: None; or 2: the mean over 2x2 windows, a last odd row or column dropped, as by
            ``avg_pool2d(out, 2)``; or ``MaxPool(kernel, stride, padding)``, as ``max_pool2d``.
        backend: "auto", or one by name: "cpu" (Numba), "gpu" (Triton), "torch".
        skip_nonfinite: leave the running statistics as they are when the batch's hold an infinity or NaN.

    Returns:
        ``(N, C, *spatial)``, smaller by ``pool``, in the memory layout of ``x``.

    Raises:
        UsageError: an activation, pool or backend that does not exist.
        UnavailableError: the backend named cannot serve this call; the message says why.
        ValueError, RuntimeError: whatever torch raises for the same arguments.

    Ioffe and Szegedy 2015, Algorithm 1.
    """
    if has_torch_function_variadic(x, running_mean, running_var, weight, bias, residual):
        out: Tensor = handle_torch_function(
            batch_norm,
            (x, running_mean, running_var, weight, bias, residual),
            x,
            running_mean,
            running_var,
            weight=weight,
            bias=bias,
            training=training,
            momentum=momentum,
            eps=eps,
            activation=activation,
            residual=residual,
            pool=pool,
            backend=backend,
            skip_nonfinite=skip_nonfinite,
        )
        return out
    check_extras(x, activation, pool, backend)
    if training:
        return step.train(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            momentum,
            eps,
            activation,
            residual,
            pool,
            backend,
            skip_nonfinite,
        )[0]
    return step.evaluate(x, running_mean, running_var, weight, bias, eps, activation, residual, pool, backend)
