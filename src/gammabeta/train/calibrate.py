"""One number that makes probabilities mean what they say: the temperature of the softmax.

A network trained with smoothed labels is too modest, one trained for long too sure. Logits divided by a
temperature T keep their order, so no answer changes; T is fitted to images that were not trained on, by their
likelihood (Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", 2017, section 4.2).
"""

import torch
from torch import Tensor

_LOWEST, _HIGHEST = 0.05, 20.0


def temperature(probabilities: Tensor, labels: Tensor) -> float:
    """Return the T for which ``softmax(logits / T)`` gives the labels the highest likelihood.

    One image more, of each class in equal shares, is counted in: a network without a mistake on a few images
    would otherwise be given certainty.

    Args:
        probabilities: float32 ``(N, classes)``, the softmax of the logits.
        labels: int64 ``(N,)``.

    Returns:
        T between 0.05 and 20; 1 where there are no images.
    """
    if not len(labels):
        return 1.0
    # Logits up to a constant for each image, which no softmax sees.
    logits = probabilities.double().clamp_min(1e-30).log()
    target = torch.full_like(logits, 1 / len(labels) / logits.shape[1])
    target[torch.arange(len(labels)), labels] += 1.0
    low, high = 1 / _HIGHEST, 1 / _LOWEST  # of 1 / T, in which the likelihood is concave
    for _ in range(30):
        middle = (low + high) / 2
        expected = ((logits * middle).softmax(1) * target.sum(1, keepdim=True) * logits).sum()
        if expected < (target * logits).sum():  # the likelihood still grows
            low = middle
        else:
            high = middle
    return 2 / (low + high)
