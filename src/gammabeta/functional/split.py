"""Batch normalization in pieces, for layers that exchange statistics between the halves of a pass.

``pieces`` gives a backend that offers every function of the kernels' contract (``gammabeta.kernels``) for
these tensors: compiled kernels where they serve, tensor operations of any dtype and device where not.
Forward: ``statistics``, exchange, ``forward``. Backward: ``backward_reduce``, exchange, ``backward_apply``
with both sums divided by the number of values everywhere.
"""

from typing import Any

from torch import Tensor

from ..kernels.layout import like as like
from . import plain
from .route import select


def pieces(
    x: Tensor,
    residual: Tensor | None = None,
    activation: str | None = None,
    pool: int | None = None,
    backend: str = "auto",
) -> tuple[Any, Tensor, Tensor | None]:
    """The backend for these tensors, and the tensors in a layout it can read.

    Upstream gradients are to be brought into the layout of ``x`` with ``like(grad, x)``; parameters to the
    dtype of the statistics: float64 for float64 input, else float32.

    Raises:
        UnavailableError: a backend was named and cannot serve the call.
    """
    road, x, residual = select(x, residual, activation, pool, backend)
    return (plain if isinstance(road, str) else road), x, residual
