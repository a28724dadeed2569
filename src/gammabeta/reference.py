"""Batch normalization from its equations, in plain tensor code.

Read from top to bottom: this is Ioffe & Szegedy, *Batch Normalization: Accelerating Deep Network Training by
Reducing Internal Covariate Shift* (2015), https://arxiv.org/abs/1502.03167, equation by equation.

The input is ``x`` of shape ``(N, C)`` or ``(N, C, *spatial)``: N samples, C channels. A *channel* is one
feature of a linear layer or one map of a convolution; all of its ``m = N · ∏ spatial`` values are normalized
together:

    μ   = 1/m Σ x                     mean over the batch
    σ²  = 1/m Σ (x − μ)²              variance over the batch, biased (divided by m, not m − 1)
    x̂   = (x − μ) / √(σ² + ε)         mean 0, variance 1 (a little less, because of ε)
    y   = γ x̂ + β                     the scale and the shift that the network learns, one of each per channel

In **training**, μ and σ² are those of the batch at hand, so each sample's output depends on all the others,
and so does its gradient. In **evaluation** they are constants, gathered during training (*running
statistics*), so that each sample's output depends on that sample alone. Nothing here is global: what lasts
from batch to batch is an argument.

Every function works on any device, is differentiable as often as wanted, and calls no kernel of this package.
The rounding is that of the dtype it is given: to check something against it, give it float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .elementary import ACTIVATIONS, mean_pool_2x2
from .epilogue import choices, named, split
from .errors import UsageError

# --- The forward pass: Algorithm 1 --------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchStatistics:
    """What one batch says about each channel.

    Attributes:
        mean: ``(C,)``.
        var: ``(C,)``, **biased**: the mean of the squared deviations.
        count: ``m``, how many values of each channel it was computed from.
    """

    mean: Tensor
    var: Tensor
    count: int

    @property
    def unbiased_var(self) -> Tensor:
        """``var · m / (m − 1)``: on average, over batches, the variance of what they were drawn from."""
        if self.count < 2:
            raise UsageError(f"an unbiased variance needs 2 values per channel or more, got {self.count}")
        return self.var * (self.count / (self.count - 1))


def batch_statistics(x: Tensor, mask: Tensor | None = None) -> BatchStatistics:
    """Return mean and biased variance of each channel of ``x``: Algorithm 1, lines 1 and 2.

    The deviations are taken from the mean first and squared then. E[x²] − E[x]² is the same on paper, but it
    subtracts two nearly equal numbers: in float32, at mean 10⁴ and variance 1, no correct digit is left.

    Of a padded batch count the values alone: ``mask``, ``(N, *spatial)``, is True where there is one, and the
    sums and ``m`` leave out all else. If there is none, mean and variance are 0.
    """
    axes = _all_but_channels(x)
    if mask is not None:
        count = int(mask.sum())
        mean = torch.where(mask.unsqueeze(1), x, 0).sum(axes) / max(count, 1)
        deviations = torch.where(mask.unsqueeze(1), x - _per_channel(mean, x), 0)
        return BatchStatistics(mean, deviations.square().sum(axes) / max(count, 1), count)
    mean = x.mean(axes)
    var = (x - _per_channel(mean, x)).square().mean(axes)
    return BatchStatistics(mean, var, x.numel() // max(x.shape[1], 1))


def normalize(x: Tensor, mean: Tensor, var: Tensor, eps: float = 1e-5) -> Tensor:
    """Return ``x̂ = (x − mean) / √(var + eps)``, per channel: Algorithm 1, line 3.

    ``eps`` stands under the root, beside the variance: it keeps a constant channel from dividing by 0.
    """
    return (x - _per_channel(mean, x)) / (_per_channel(var, x) + eps).sqrt()


def scale_and_shift(xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return ``y = γ x̂ + β``, per channel: Algorithm 1, line 4. None stands for γ = 1, β = 0.

    With γ = √(σ² + ε) and β = μ the layer undoes its own normalization: the network can still learn every
    function that it could learn without it.
    """
    y = xhat if weight is None else _per_channel(weight, xhat) * xhat
    return y if bias is None else y + _per_channel(bias, xhat)


# --- Running statistics: what evaluation uses; Algorithm 2 --------------------------------------------------


@dataclass(frozen=True)
class RunningStatistics:
    """What all batches so far say about each channel. An update returns a new one and leaves this as it is.

    Attributes:
        mean: ``(C,)``.
        var: ``(C,)``, **unbiased**.
        batches: Number of batches seen.
        count: Number of values per channel seen, over all batches.
    """

    mean: Tensor
    var: Tensor
    batches: int = 0
    count: int = 0

    @classmethod
    def initial(
        cls, channels: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> "RunningStatistics":
        """Return mean 0 and variance 1, nothing seen yet: where torch starts."""
        zeros = torch.zeros(channels, dtype=dtype, device=device)
        return cls(zeros, zeros + 1)


def update_exponential(
    running: RunningStatistics, batch: BatchStatistics, momentum: float = 0.1
) -> RunningStatistics:
    """Return ``(1 − momentum) · running + momentum · batch``; ``momentum`` weighs the **new**.

    Recent batches count most: after k more batches one weighs ``momentum · (1 − momentum)ᵏ``. The start
    weighs ``(1 − momentum)ᵏ`` after k batches: 35 % after 10 of them at momentum 0.1, still 0.003 % after
    100.
    """
    mean = (1 - momentum) * running.mean + momentum * batch.mean
    var = (1 - momentum) * running.var + momentum * batch.unbiased_var
    return RunningStatistics(mean, var, running.batches + 1, running.count + batch.count)


def update_from_first_batch(
    running: RunningStatistics, batch: BatchStatistics, momentum: float = 0.1
) -> RunningStatistics:
    """As `update_exponential`, but the first batch replaces the start, which is not data.

    This is what the notebook does. (Its 0.9 weighs the old value: our ``momentum`` is 0.1.)
    """
    return update_exponential(running, batch, momentum if running.batches else 1.0)


def update_cumulative(running: RunningStatistics, batch: BatchStatistics) -> RunningStatistics:
    """Every batch weighs the same: torch's ``momentum=None``, and the averages of Algorithm 2.

    The mean of the batches' means is exact for batches of one size. The mean of their variances is too small:
    it leaves out how far the batches' means lie apart. `update_pooled` is exact.
    """
    return update_exponential(running, batch, 1 / (running.batches + 1))


def update_pooled(running: RunningStatistics, batch: BatchStatistics) -> RunningStatistics:
    """Every *value* weighs the same: the result is the mean and variance of all values seen so far.

    However the data are split into batches, even unevenly, the result is the same. With sums of squared
    deviations M₂ and counts a, b (Chan, Golub & LeVeque 1979):

        ``M₂ = M₂ᵃ + M₂ᵇ + (μᵇ − μᵃ)² · ab / (a + b)``.
    """
    a, b = running.count, batch.count
    total = a + b
    if total < 2:
        raise UsageError(f"an unbiased variance needs 2 values per channel or more, got {total}")
    apart = batch.mean - running.mean
    squares = max(a - 1, 0) * running.var + b * batch.var + apart.square() * (a * b / total)
    return RunningStatistics(
        running.mean + apart * (b / total), squares / (total - 1), running.batches + 1, total
    )


# --- The layer, as torch.nn.functional.batch_norm has it ----------------------------------------------------


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
    pool: int | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Return ``pool(activation(bn(x) + residual))``; in training, update the running statistics in place.

    Half-precision input is computed in float32, and the result rounded to ``x``'s dtype once, at the end.

    Args:
        x: ``(N, C, *spatial)``, floating point.
        running_mean: ``(C,)``, or None to have no running statistics (training only).
        running_var: ``(C,)``, **unbiased**; None if and only if ``running_mean`` is.
        weight: γ, ``(C,)``, or None for 1.
        bias: β, ``(C,)``, or None for 0.
        training: Normalize with the batch's own mean and biased variance, and update the running ones.
        momentum: Weight of the **new** value in that update. (The cumulative average needs to know how many
            batches came before, which these arguments do not say: see `update_cumulative`.)
        eps: Added to the variance.
        activation: None, or a name in `elementary.ACTIVATIONS`: "relu", "gelu" and others; some take
            numbers: "leaky_relu(0.2)".
        residual: Added before the activation; of the shape of ``x``.
        pool: None, or 2 for the mean of each 2x2 block (4-D only; an odd last row or column is left out).
        mask: bool ``(N, *spatial)``, True where there is a value. All else is padding: nothing in the
            statistics, and 0 in the result. Not with a pool.
        lengths: The same for sequences (N, C, L): integers ``(N,)``, how many values come first in each.

    Returns:
        A tensor of the shape of ``x`` (with ``pool=2``, half its height and width), and of its dtype.

    Raises:
        UsageError: Arguments that do not fit together, or a single value per channel in training: its
            deviation from the mean is always 0, so the output would not depend on it.
    """
    if lengths is not None:
        mask = torch.arange(x.shape[2], device=x.device) < lengths.unsqueeze(1)
    _check_tensors(x, running_mean, running_var, weight, bias, residual, training)
    _check_mask(x, mask, training, pool)
    _check_settings(training, momentum, eps, activation, pool)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if mask is not None:
        wide = torch.where(
            mask.unsqueeze(1), wide, 0
        )  # padding may be NaN, which no zero gradient takes away
    if training:
        batch = batch_statistics(wide, mask)
        mean, var = batch.mean, batch.var
        if running_mean is not None and running_var is not None and batch.count:
            _update_in_place(running_mean, running_var, batch, momentum)
    else:
        assert running_mean is not None  # `_check_tensors` refuses None; this tells the type checker
        assert running_var is not None
        mean, var = running_mean, running_var
    out = scale_and_shift(normalize(wide, mean, var, eps), weight, bias)
    if residual is not None:
        out = out + residual
    if activation is not None:
        name, numbers = split(activation)
        out = ACTIVATIONS[name](out, *numbers)
    if pool is not None:
        out = mean_pool_2x2(out)
    if mask is not None:
        out = torch.where(mask.unsqueeze(1), out, 0)
    return out.to(x.dtype)


def batch_renorm(
    x: Tensor,
    running: RunningStatistics,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    limits: tuple[float, float] = (3.0, 5.0),
    momentum: float = 0.01,
    eps: float = 1e-5,
) -> tuple[Tensor, RunningStatistics]:
    """Return a training step of batch renormalisation, and the running statistics after it.

        r = σ_B / σ, within [1/r_max, r_max]        d = (μ_B − μ) / σ, within [−d_max, d_max]
        x̂ = (x − μ_B) / σ_B · r + d                 y = γ x̂ + β

    σ_B² = var_B + ε is the batch's (biased), σ² = var + ε the running one of before this batch. r and d are
    constants in the gradient. ``limits`` are r_max and d_max; (1, 0) is batch normalization, and where none
    is reached x̂ = (x − μ) / σ, as in evaluation.

    Ioffe 2017, *Batch Renormalization*, https://arxiv.org/abs/1702.03275, Algorithm 1. (It averages σ; here,
    as in torch, the variance is averaged.)
    """
    batch, (r_max, d_max) = batch_statistics(x), limits
    deviation = (running.var + eps).sqrt()
    r = ((batch.var + eps).sqrt() / deviation).clamp(1 / r_max, r_max).detach()
    d = ((batch.mean - running.mean) / deviation).clamp(-d_max, d_max).detach()
    xhat = normalize(x, batch.mean, batch.var, eps) * _per_channel(r, x) + _per_channel(d, x)
    seen = BatchStatistics(batch.mean.detach(), batch.var.detach(), batch.count)
    return scale_and_shift(xhat, weight, bias), update_exponential(running, seen, momentum)


def _update_in_place(
    running_mean: Tensor, running_var: Tensor, batch: BatchStatistics, momentum: float
) -> None:
    # For later batches these are constants: no gradient flows into them.
    seen = BatchStatistics(batch.mean.detach(), batch.var.detach(), batch.count)
    updated = update_exponential(RunningStatistics(running_mean, running_var), seen, momentum)
    running_mean.copy_(updated.mean)
    running_var.copy_(updated.var)


# --- The backward pass: section 3 ---------------------------------------------------------------------------
# autograd differentiates everything above by itself. The same gradients by hand, given ``grad`` = ∂L/∂y:


@dataclass(frozen=True)
class Gradients:
    """∂L/∂x with the shape of ``x``, and ∂L/∂γ and ∂L/∂β with shape ``(C,)``."""

    x: Tensor
    weight: Tensor
    bias: Tensor


def backward_step_by_step(grad: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-5) -> Gradients:
    """Return the gradients in training, by the paper's six equations of section 3, in their order."""
    axes, batch = _all_but_channels(x), batch_statistics(x)
    centred = x - _per_channel(batch.mean, x)
    variance = batch.var + eps
    d_xhat = grad * _per_channel(weight, x)
    d_var = (d_xhat * centred).sum(axes) * -0.5 * variance ** (-3 / 2)
    d_mean = -d_xhat.sum(axes) / variance.sqrt() + d_var * (-2 * centred).mean(axes)
    d_x = d_xhat / _per_channel(variance.sqrt(), x)  # x moves its own x̂ …
    d_x = d_x + _per_channel(d_var, x) * 2 * centred / batch.count  # … and the variance of all …
    d_x = d_x + _per_channel(d_mean, x) / batch.count  # … and the mean of all
    d_weight = (grad * normalize(x, batch.mean, batch.var, eps)).sum(axes)
    return Gradients(d_x, d_weight, grad.sum(axes))


def backward_training(grad: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-5) -> Gradients:
    """Return the gradients in training, the six equations put into one another. This is what kernels compute.

        ∂L/∂x = γ / √(σ² + ε) · (g − mean(g) − x̂ · mean(g · x̂))        with g = ∂L/∂y

    It says what normalization does to a gradient. Two parts are removed: the part along 1 (a shift of the
    whole channel) and the part along x̂ (a stretch of the channel), because the layer undoes both. So a loss
    that is the plain sum of the outputs has gradient 0, and a test that uses this loss tests nothing.
    """
    axes, batch = _all_but_channels(x), batch_statistics(x)
    xhat = normalize(x, batch.mean, batch.var, eps)
    shift, stretch = grad.mean(axes), (grad * xhat).mean(axes)
    slope = weight / (batch.var + eps).sqrt()
    d_x = _per_channel(slope, x) * (grad - _per_channel(shift, x) - xhat * _per_channel(stretch, x))
    return Gradients(d_x, stretch * batch.count, shift * batch.count)


def backward_evaluation(
    grad: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, eps: float = 1e-5
) -> Gradients:
    """Return the gradients in evaluation: mean and variance are constants, the layer a straight line."""
    axes = _all_but_channels(x)
    slope = weight / (var + eps).sqrt()
    d_weight = (grad * normalize(x, mean, var, eps)).sum(axes)
    return Gradients(_per_channel(slope, x) * grad, d_weight, grad.sum(axes))


# --- The notebook's own variant -----------------------------------------------------------------------------


def batch_norm_eps_on_std(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Return ``γ (x − μ) / (σ + eps) + β`` with the batch's statistics: eps is added to the **deviation**.

    The original notebook's ``pure_batch_norm``, whose printed examples it reproduces to 10⁻⁶. The paper,
    torch and the notebook's own later function add eps to the variance. (It broadcast γ over the width; here
    γ belongs to the channel. Its example B lists 17 numbers for 16 places; the last is left over.)
    """
    batch = batch_statistics(x)
    xhat = (x - _per_channel(batch.mean, x)) / (_per_channel(batch.var, x).sqrt() + eps)
    return scale_and_shift(xhat, weight, bias)


# --- Shapes and mistakes ------------------------------------------------------------------------------------


def _all_but_channels(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Shape ``(C,)`` as ``(1, C, 1, …)``, so that each channel of ``x`` meets its own value."""
    return values.reshape(1, -1, *[1] * (x.dim() - 2))


def _check_tensors(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
) -> None:
    shape = tuple(x.shape)
    if x.dim() < 2:
        raise UsageError(f"x must be (N, C) or (N, C, *spatial), got {shape}")
    if not x.is_floating_point():
        raise UsageError(f"x must be floating point, got {x.dtype}: convert it with .float()")
    named = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, values in named.items():
        if values is not None and values.shape != (shape[1],):
            raise UsageError(f"{name} must have shape ({shape[1]},) for x {shape}, got {tuple(values.shape)}")
    if (running_mean is None) != (running_var is None):
        raise UsageError("running_mean and running_var belong together: pass both or neither")
    if not training and running_mean is None:
        raise UsageError("evaluation normalizes with running_mean and running_var: pass both")
    if training and x.numel() == shape[1]:
        raise UsageError(f"Expected more than 1 value per channel when training, got input size {shape}")
    if residual is not None and residual.shape != x.shape:
        raise UsageError(f"residual must have the shape of x, {shape}, got {tuple(residual.shape)}")


def _check_mask(x: Tensor, mask: Tensor | None, training: bool, pool: int | None) -> None:
    if mask is None:
        return
    where = (x.shape[0], *x.shape[2:])
    if mask.dtype is not torch.bool or tuple(mask.shape) != where:
        raise UsageError(f"mask must be a bool tensor {where}, got {mask.dtype} {tuple(mask.shape)}")
    if pool is not None:
        raise UsageError("pool and mask do not go together: a window may hold both values and padding")
    if training and int(mask.sum()) == 1:
        raise UsageError("Expected more than 1 value per channel when training, got a mask that keeps 1")


def _check_settings(
    training: bool, momentum: float, eps: float, activation: str | None, pool: int | None
) -> None:
    if training and momentum is None:
        raise UsageError("momentum=None needs the number of batches: pass 1/batches, this one included")
    if eps < 0 or (training and eps == 0):
        raise UsageError(f"eps must be positive (in evaluation it may be 0), got {eps}")
    if activation is not None and named(activation) is None:
        raise UsageError(f"activation {activation!r} is not one of {choices()}")
    if pool not in (None, 2):
        raise UsageError(f"pool must be None or 2, got {pool!r}")
