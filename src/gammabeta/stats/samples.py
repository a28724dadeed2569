"""The samples of a batch, whatever form a loader gives it: how many, some of them, several batches as one.

A batch is a tensor of rows; columns (``(inputs, targets)``, a dict); a list with one item for each sample
(images of different sizes, pairs of image and target, dicts, graphs); or an object that counts itself.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_COLOURS = (1, 3, 4)  # the leading size of one image
_DEEPEST = 5


def count(batch: Any, depth: int = 0) -> int:
    """Samples in ``batch``; 0 where there is no tensor.

    Objects say it by ``num_graphs`` or ``batch_size``, or by the first of their attributes with samples.
    """
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    if isinstance(batch, str | bytes) or depth > _DEEPEST:
        return 0
    if isinstance(batch, Mapping):
        return _first(count(value, depth + 1) for value in batch.values())
    if isinstance(batch, list | tuple):
        return len(batch) if are_samples(batch) else _of_columns(batch, depth + 1)
    for name in ("num_graphs", "batch_size"):
        counted = getattr(batch, name, None)
        if isinstance(counted, int):
            return counted
    return _first(count(value, depth + 1) for value in getattr(batch, "__dict__", {}).values())


def _of_columns(columns: Sequence[Any], depth: int) -> int:
    """The first column says it, unless that is a list which another column shows to be of several inputs."""
    sizes = [count(column, depth) for column in columns]
    if sizes and isinstance(columns[0], list | tuple) and sizes[0] not in sizes[1:]:
        rows = _first(count(item, depth) for item in columns[0])
        if rows in sizes[1:]:
            return rows
    return _first(sizes)


def _first(sizes: Iterable[int]) -> int:
    return next((size for size in sizes if size), 0)


def are_samples(items: Sequence[Any]) -> bool:
    """Whether the items of a list are samples, and not the columns of a batch."""
    if not items:
        return False
    if all(isinstance(item, Mapping) for item in items):
        batched = any(isinstance(value, Tensor) and value.dim() > 3 for value in items[0].values())
        return not batched and all(item.keys() == items[0].keys() for item in items)
    if all(isinstance(item, Tensor) for item in items):
        return _are_single(items)
    if all(isinstance(item, list | tuple) and item for item in items):
        # Columns are lists of like things, or of one length; a pair of an image and its target is not.
        return any(len({_kind(value) for value in item}) > 1 for item in items) and not _of_one_length(items)
    plain = (Tensor, str, bytes, int, float, list, tuple, Mapping, type(None))
    return isinstance(items, list) and not any(isinstance(item, plain) for item in items)


def _are_single(tensors: Sequence[Tensor]) -> bool:
    """Whether these are samples of one kind, not columns: as columns have, they would be of one length.

    Images are alike in channels, not in size; or have as many channels as there are colours. Two of one
    channel may be the input and the target of one sample.
    """
    if len({t.dim() for t in tensors}) > 1 or not tensors[0].dim():
        return False
    lengths, sizes = {t.shape[0] for t in tensors}, {t.shape[1:] for t in tensors}
    if len(lengths) > 1:
        return len(tensors) > 2
    images = tensors[0].dim() == 3 and tensors[0].is_floating_point()
    return images and (len(sizes) > 1 or lengths <= set(_COLOURS[len(tensors) == 2 :]))


def _of_one_length(items: Sequence[Any]) -> bool:
    """Whether all that the items hold are tensors with as many rows."""
    values = [value for item in items for value in item]
    return all(isinstance(v, Tensor) and v.dim() for v in values) and len({len(v) for v in values}) == 1


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
    if len(batch) == samples and (are_samples(batch) or not _have(batch, samples)):
        return type(batch)(batch[i] for i in index.tolist())
    return type(batch)(take(item, index, samples) for item in batch)


def _have(items: Sequence[Any], samples: int) -> bool:
    """Whether the items are columns: each has ``samples`` of its own."""
    return any(count(item) == samples and not isinstance(item, str) for item in items)


def join(parts: Sequence[Any]) -> Any:
    """One batch of what ``take`` gave of several, each a single sample; what has no samples is the first's.

    Raises:
        RuntimeError: the parts do not fit together, such as images of different sizes in one tensor.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts)) if first.dim() and first.shape[0] == 1 else first
    if isinstance(first, Mapping):
        return {key: join([part[key] for part in parts]) for key in first}
    if not isinstance(first, list | tuple):
        return first
    if hasattr(first, "_fields"):
        return type(first)(*(join(column) for column in zip(*parts, strict=True)))
    is_list = len(first) == 1 and (are_samples(first) or not _have(first, 1))
    if is_list:
        return type(first)(chain.from_iterable(parts))
    return type(first)(join(column) for column in zip(*parts, strict=True))


def sizes(batch: Any, samples: int) -> list[tuple[int, ...]]:
    """The shape of each sample's first tensor, of a batch that is a list or has one; else none."""
    if isinstance(batch, Tensor):
        return []
    shapes = []
    for index in range(samples):
        one = take(batch, torch.tensor([index]), samples)
        shape = next((tuple(t.shape) for t in tree_leaves(one) if isinstance(t, Tensor) and t.dim()), None)
        if shape is None:
            return []
        shapes.append(shape)
    return shapes
