"""How a batch of a loader reaches a model: what is input, what is target, on which device, in which dtype."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..graph.record import map_tensors

ForwardFn = Callable[[nn.Module, Any], Any]


def move(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """``value`` with every tensor in it on ``device``, and floating ones in ``dtype`` where one is given."""
    return map_tensors(value, lambda t: t.to(device, dtype if t.is_floating_point() else None))


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    """Where the model's input belongs, and the dtype it must have when the model is in half precision."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            half = parameter.dtype in (torch.float16, torch.bfloat16)
            return parameter.device, parameter.dtype if half else None
    for buffer in model.buffers():
        return buffer.device, None
    return torch.device("cpu"), None


def call(model: nn.Module, batch: Any) -> Any:
    """Run ``model`` on ``batch``: a tensor; ``(input, target, …)``; or a mapping.

    A mapping goes in by keyword where ``forward`` has parameters of its keys' names, and whole otherwise. For
    anything else give a ``forward_fn``.
    """
    if isinstance(batch, Mapping):
        names = inspect.signature(model.forward).parameters
        known = {key: item for key, item in batch.items() if key in names}
        return model(**known) if known else model(batch)
    if isinstance(batch, list | tuple):
        if not batch:
            raise UsageError("the loader gave an empty tuple: expected a tensor, (input, target) or a dict")
        return model(batch[0])
    return model(batch)


def target(batch: Any) -> Any:
    """What a loss compares the output with: the second of ``(input, target)``, else the whole batch."""
    if isinstance(batch, list | tuple) and len(batch) > 1:
        return batch[1]
    return batch


def size(batch: Any) -> int:
    """Samples in ``batch``: the length of the first tensor found in it; 0 when there is none."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    items = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((n for n in map(size, items) if n), 0)


def take(value: Any, index: Tensor, samples: int) -> Any:
    """``value`` with every tensor of ``samples`` rows reduced to the rows in ``index``."""

    def rows(tensor: Tensor) -> Tensor:
        whole = tensor.dim() > 0 and tensor.shape[0] == samples
        return tensor[index.to(tensor.device)] if whole else tensor

    return map_tensors(value, rows)


def batches(
    loader: Iterable[Any], samples: int | None, place: tuple[torch.device, torch.dtype | None]
) -> Iterator[Any]:
    """Whole batches of ``loader``, moved to ``place``, until at least ``samples`` samples have been given."""
    seen = 0
    for batch in loader:
        yield move(batch, *place)
        seen += size(batch)
        if samples is not None and seen >= samples:
            return
