"""How a batch of a loader reaches a model: what is input, what is target, on which device, in which dtype."""

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .samples import are_samples, count

ForwardFn = Callable[[nn.Module, Any], Any]


def move(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """``value`` with every tensor in it on ``device``, and floating ones in ``dtype`` where one is given.

    A dataclass is copied with its tensors moved; other objects move themselves if they have a ``to``.
    """
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {key: move(item, device, dtype) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(move(item, device, dtype) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(move(item, device, dtype) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        moved = copy.copy(value)
        for field in fields(value):
            object.__setattr__(moved, field.name, move(getattr(value, field.name), device, dtype))
        return moved
    return value.to(device) if callable(getattr(value, "to", None)) else value


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
    """Run ``model`` on ``batch``: a tensor; ``(input, target, …)``; a mapping; or a list of samples.

    A mapping goes in by keyword where ``forward`` has parameters of its keys' names or takes any keyword, and
    whole otherwise; so does a list of dicts or objects, one a sample. For anything else give a
    ``forward_fn``.

    Raises:
        UsageError: ``forward`` cannot be called so.
    """
    args, keywords = _arguments(model, batch)
    try:
        inspect.signature(model.forward).bind(*args, **keywords)
    except TypeError as error:
        raise UsageError(_misfit(model, batch, error)) from error
    except ValueError:  # it has no signature, as compiled ones
        pass
    try:
        return model(*args, **keywords)
    except TypeError as error:
        if not _MISCALLED.search(str(error)):
            raise
        raise UsageError(_misfit(model, batch, error)) from error


# What Python, and TorchScript, say of a call whose arguments do not fit.
_MISCALLED = re.compile(
    r"missing .*argument|unexpected keyword|positional argument|missing value for argument"
)


def _arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        try:
            parameters = inspect.signature(model.forward).parameters
        except ValueError:
            return (batch,), {}
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return (), {str(key): item for key, item in batch.items()}
        known = {key: item for key, item in batch.items() if key in parameters}
        return ((), known) if known else ((batch,), {})
    if isinstance(batch, list | tuple):
        if not batch:
            raise UsageError("the loader gave an empty tuple: expected a tensor, (input, target) or a dict")
        return (batch if _of_samples(batch) else batch[0],), {}
    return (batch,), {}


def _misfit(model: nn.Module, batch: Any, error: Exception) -> str:
    if isinstance(batch, Mapping):
        gave = f"the keys {', '.join(map(str, batch))}"
        how = 'model(batch["…"])'
    elif _of_samples(batch):
        gave, how = f"a list of {len(batch)} samples", "model([sample[…] for sample in batch])"
    elif isinstance(batch, list | tuple):
        gave, how = f"the first of a batch's {len(batch)} parts", "model(batch[0], batch[1])"
    else:
        gave, how = f"a {type(batch).__name__}", "model(batch.…)"
    reason = str(error).strip().partition("\n")[0]
    return (
        f"{type(model).__name__}.forward cannot be called with {gave} ({reason}):"
        f" give forward_fn=lambda model, batch: {how}"
    )


def target(batch: Any) -> Any:
    """What a loss compares the output with: the second of ``(input, target)``, else the whole batch."""
    if isinstance(batch, list | tuple) and len(batch) > 1 and not _of_samples(batch):
        return batch[1]
    return batch


def _of_samples(batch: Any) -> bool:
    """Whether a batch is a list of dicts, pairs or objects, one for each sample.

    A list of tensors may be that or (input, target), and is taken for the latter.
    """
    return isinstance(batch, list) and are_samples(batch) and not isinstance(batch[0], Tensor)


def whole_batches(
    loader: Iterable[Any], samples: int | None, place: tuple[torch.device, torch.dtype | None]
) -> Iterator[Any]:
    """Whole batches of ``loader``, moved to ``place``, until at least ``samples`` samples have been given."""
    seen = 0
    for batch in loader:
        yield move(batch, *place)
        seen += count(batch) or 1
        if samples is not None and seen >= samples:
            return
