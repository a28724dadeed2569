"""``update_bn``: for code that calls ``torch.optim.swa_utils.update_bn``."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..arguments import check_batches, check_model
from ..graph.layers import unwrap
from .batches import call, move
from .norms import frozen_norms, with_statistics
from .recalibrate import recalibrate


def update_bn(
    loader: Iterable[Any], model: nn.Module, device: torch.device | int | str | None = None
) -> None:
    """Set the running statistics of an averaged model, with the signature of PyTorch's function.

    PyTorch's weighs every batch alike, whatever its size, forgets what the layers held if a batch fails, and
    thaws frozen layers. This calls ``recalibrate``: every value weighs the same, and all or nothing.

    Args:
        loader: batches: tensors, or tuples or lists whose first element is the input.
        model: the model, or an ``AveragedModel`` of one; without batch normalization nothing happens.
        device: where the batches go; None: where the model is.

    Raises:
        SurgeryError, UsageError: as ``recalibrate``; the model is as it was.
    """
    check_model("update_bn", model)
    check_batches("update_bn", loader)
    inner = unwrap(model)
    found = with_statistics(inner)
    if not found.keys() - frozen_norms(inner, found):
        return

    def forward(module: nn.Module, batch: Any) -> Any:
        return call(module, batch if device is None else move(batch, torch.device(device), None))

    recalibrate(model, loader, forward_fn=forward)
