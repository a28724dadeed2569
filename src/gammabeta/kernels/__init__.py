"""Batch normalization compiled for the machine it runs on: Numba for the CPU, Triton for GPUs.

Both backends offer the same functions, so that one autograd rule serves them. ``x`` is ``(N, C, *spatial)``,
contiguous or channels_last; everything per channel is float32 of shape ``(C,)``; ``var`` is biased;
``invstd = 1 / sqrt(var + eps)``; ``z = weight * (x - mean) * invstd + bias + residual``;
``out = pool(activation(z))``; ``xhat = (x - mean) * invstd``; ``dz`` is the loss's gradient at ``z``.

========================  ==============================================================================
``unsupported``           ``(x, residual, activation, pool) -> str | None``: why this backend cannot run it
``statistics``            ``(x) -> (mean, var)``
``forward_train``         ``(x, weight, bias, residual, eps, activation, pool) -> (out, mean, var, invstd)``
``forward``               ``(x, mean, invstd, weight, bias, residual, activation, pool) -> out``
``backward_reduce``       ``(grad, x, mean, invstd, weight, bias, residual, activation, pool)``
                          ``-> (sum_dz, sum_dz_xhat)``, the gradients of bias and weight
``backward_apply``        ``(grad, x, mean, invstd, weight, bias, residual, activation, pool, mean_dz,``
                          ``mean_dz_xhat, need_residual) -> (dx, dresidual)``; both means zero in evaluation
``backward``              both in one: ``(grad, x, mean, invstd, weight, bias, residual, activation, pool,``
                          ``need_residual) -> (dx, dweight, dbias, dresidual)``, statistics differentiated
``update_running``        ``(running_mean, running_var, mean, var, count, factor, skip_nonfinite) -> bool``:
                          in place, unbiased variance, ``factor`` the weight of the new; False if refused
                          (on a GPU a boolean tensor: the host does not wait to read it)
========================  ==============================================================================

Max pooling (``pool`` a ``layout.MaxPool``) is the CPU's only. There all that take ``pool`` take ``codes``,
which ``codes_of(x, pool)`` makes, a forward pass fills and the backward pass reads: for each output which
element of its window it is. A forward pass without codes gives the output alone.
"""
