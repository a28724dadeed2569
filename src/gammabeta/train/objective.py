"""What a training minimises: cross-entropy, with whatever the recipe adds to it.

The loss that is *shown* is the plain cross-entropy of the same batches (`loop.Progress`), so that losses of
different recipes can be compared.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .recipe import Recipe


class Objective:
    """Cross-entropy of logits ``(B, classes)`` and labels ``(B,)``, smoothed, weighted and mixed as told.

    ``labels`` are those of all training images; balanced weights of classes are ``N / (K n_k)`` for ``n_k``
    of ``N`` images in class ``k`` of ``K``, so that every class counts alike.
    """

    def __init__(self, recipe: Recipe, labels: Tensor, *, summed: bool) -> None:
        self._smoothing, self._summed = recipe.label_smoothing, summed
        self._labels = labels if recipe.class_weights == "balanced" else None
        self._weights: Tensor | None = None

    def __call__(self, logits: Tensor, y: Tensor, other: Tensor | None = None, share: float = 1.0) -> Tensor:
        """Return the sum or mean over the batch; ``share`` of an image is ``y``, the rest ``other``."""
        loss = self._of(logits, y)
        return loss if other is None else share * loss + (1 - share) * self._of(logits, other)

    def _of(self, logits: Tensor, y: Tensor) -> Tensor:
        if self._labels is not None and self._weights is None:
            counts = torch.bincount(self._labels, minlength=logits.shape[1])
            self._weights = counts.sum() / ((counts > 0).sum() * counts.clamp(min=1)).float()
        reduction = "sum" if self._summed or self._weights is not None else "mean"
        loss = F.cross_entropy(logits, y, self._weights, reduction=reduction, label_smoothing=self._smoothing)
        # The mean is over images: torch's own would divide by the weights of those that are in the batch.
        return loss / len(y) if self._weights is not None and not self._summed else loss
