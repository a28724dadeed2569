"""The samples of a batch, whatever form a loader gives it: how many, and some of them.

A batch is a tensor of rows, columns (``(inputs, targets)``, a dict), or a list with one item for each sample:
images of different sizes, pairs of image and target, dicts.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..stats import batches

_COLOURS = (1, 3, 4)  # the leading size of one image


def count(batch: Any) -> int:
    """Samples in ``batch``; 0 where there is no tensor."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    if isinstance(batch, Mapping):
        return _first(map(count, batch.values()))
    if isinstance(batch, str | bytes):
        return 0
    if not isinstance(batch, list | tuple):
        return batches.size(batch)  # a graph, a dataclass
    if not batch:
        return 0
    return len(batch) if _one_each(batch) else _of_columns(batch)


def _of_columns(columns: list[Any] | tuple[Any, ...]) -> int:
    """The first column says it, unless that is a list which another column shows to be of several inputs."""
    sizes = [count(column) for column in columns]
    first, others = columns[0], sizes[1:]
    if isinstance(first, list | tuple) and sizes[0] not in others:
        rows = batches.size(first)
        if rows in others:
            return rows
    return _first(sizes)


def _first(sizes: Iterable[int]) -> int:
    return next((size for size in sizes if size), 0)


def _one_each(items: list[Any] | tuple[Any, ...]) -> bool:
    """Whether the items are samples, and not columns."""
    if all(isinstance(item, Mapping) for item in items):
        return not any(isinstance(value, Tensor) and _batched(value) for value in items[0].values())
    if all(isinstance(item, Tensor) for item in items):
        return _images(items)
    if all(isinstance(item, list | tuple) and item for item in items):
        # Columns are lists of like things; a pair of an image and its target is not.
        return any(len({_kind(value) for value in item}) > 1 for item in items)
    return False


def _batched(tensor: Tensor) -> bool:
    """Whether a tensor looks like a batch of images, not like one image or its boxes."""
    return tensor.dim() > 3


def _images(tensors: list[Any] | tuple[Any, ...]) -> bool:
    """Whether these are single images: alike in channels, not in size; or with as few channels as colours."""
    if any(t.dim() != 3 or not t.is_floating_point() for t in tensors):
        return False
    channels, sizes = {t.shape[0] for t in tensors}, {t.shape[1:] for t in tensors}
    return len(channels) == 1 and (len(sizes) > 1 or channels <= set(_COLOURS))


def _kind(value: Any) -> tuple[type, int]:
    return type(value), value.dim() if isinstance(value, Tensor) else 0


def take(batch: Any, index: Tensor, samples: int) -> Any:
    """The samples in ``index`` of a batch of ``samples``: rows of its tensors, items of its lists."""
    if isinstance(batch, Tensor):
        whole = batch.dim() > 0 and batch.shape[0] == samples
        return batch[index.to(batch.device)] if whole else batch
    if isinstance(batch, Mapping):
        return {key: take(value, index, samples) for key, value in batch.items()}
    if not isinstance(batch, list | tuple):
        return batch
    if hasattr(batch, "_fields"):
        return type(batch)(*(take(item, index, samples) for item in batch))
    if len(batch) == samples and (_one_each(batch) or not _rows(batch, samples)):
        return type(batch)(batch[i] for i in index.tolist())
    return type(batch)(take(item, index, samples) for item in batch)


def _rows(items: list[Any] | tuple[Any, ...], samples: int) -> bool:
    """Whether the items are columns: each has ``samples`` of its own."""
    return any(count(item) == samples and not isinstance(item, str) for item in items)


def whole_batches(
    loader: Iterable[Any], samples: int | None, place: tuple[torch.device, torch.dtype | None]
) -> Iterator[Any]:
    """Whole batches of ``loader``, moved to ``place``, until at least ``samples`` samples have been given."""
    seen = 0
    for batch in loader:
        yield batches.move(batch, *place)
        seen += count(batch)
        if samples is not None and seen >= samples:
            return
