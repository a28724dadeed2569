"""Biases that batch normalization takes away again: their gradient is zero and need not be computed.

Batch normalization subtracts the mean over the batch, and with it whatever was added to a whole channel
before (Ioffe and Szegedy 2015, section 3.2). What a backward pass computes for such a bias is the rounding
error of a zero, at the cost of reading the largest gradients of a network once more.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ..graph.pairs import convolutions_before_batch_norm


def cancelled_biases(model: nn.Module) -> list[Tensor]:
    """Return the biases of convolutions whose output goes into one batch normalization and nowhere else."""
    pairs = convolutions_before_batch_norm(model)
    return [convolution.bias for convolution, _ in pairs if convolution.bias is not None]


@contextmanager
def without_cancelled_biases(model: nn.Module) -> Iterator[None]:
    """Leave out the gradients of ``cancelled_biases`` for a while."""
    biases = [bias for bias in cancelled_biases(model) if bias.requires_grad]
    for bias in biases:
        bias.requires_grad_(False)
    try:
        yield
    finally:
        for bias in biases:
            bias.requires_grad_(True)
