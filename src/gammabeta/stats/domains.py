"""Running statistics of several domains, side by side in one model.

One set of statistics for each domain, and shared weights: Li et al. (2016), "Revisiting batch normalization
for practical domain adaptation", section 3.2.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_model
from ..errors import SurgeryError, UsageError
from ..graph.layers import unwrap
from .norms import statistics, with_statistics
from .preserve import overwrite

_CHILD = "batch_norm_domains"
_FIRST = "source"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def domains(model: nn.Module, *, first: str = _FIRST) -> "Domains":
    """Return what keeps a model's statistics for each domain; made at the first call.

    It is a child of the model, ``model.batch_norm_domains``. So ``print(model)`` says which domain the model
    is in, and ``state_dict()`` holds the statistics of all. In a Sequential it is a last step that changes
    nothing. A state dict with domains does not load into a model without them under ``strict=True``: call
    ``gb.domains(model)`` first.

    Args:
        model: any module with batch normalization in it.
        first: what the statistics that the model has now are called, if it keeps no domains yet.

    Raises:
        SurgeryError: the model has no norm with running statistics.
        UsageError: a name that is not made of letters, digits, ``_`` and ``-``, or that modules have a use
            for, such as ``train``.
    """
    check_model("domains", model)
    inner = unwrap(model)
    kept = getattr(inner, _CHILD, None)
    if not isinstance(kept, Domains):
        kept = Domains(inner, first)
        inner.add_module(_CHILD, kept)
    return kept


class Domains(nn.Module):
    """The statistics of each domain, and which of them the model uses.

    What the norms hold belongs to the domain in use, and goes with it: it is kept when another is chosen.
    """

    def __init__(self, model: nn.Module, first: str) -> None:
        super().__init__()
        self._model = [model]  # in a list, so that it is not a child of its own child
        if not self._layers():
            raise SurgeryError("the model has no batch normalization with running statistics")
        _check_name(first)
        self._keep(first)
        self._choose(first)
        hook: Any = self.register_state_dict_pre_hook
        hook(_before_saving)

    @property
    def names(self) -> list[str]:
        """The domains, in the order in which they came."""
        return list(self._modules)

    @property
    def current(self) -> str:
        """The domain that the model is in."""
        return next((name for name, kept in self._kept.items() if int(kept.in_use)), self.names[0])

    def add(self, name: str) -> None:
        """Start a domain with a copy of the present statistics, and put the model into it.

        Raises:
            UsageError: there is one of this name, or it is no name.
        """
        _check_name(name, self.names)
        self._keep(self.current)
        self._keep(name)
        self._choose(name)

    def use(self, name: str) -> None:
        """Put the model into a domain: its norms get that domain's statistics.

        Raises:
            UsageError: there is no such domain.
            SurgeryError: the model's norms are not those that the domains were kept for.
        """
        if name not in self._modules:
            raise UsageError(f"there is no domain {name!r}: the model has {', '.join(self.names)}")
        self._keep(self.current)
        for kept, held in self._pairs(name, self._layers()):
            overwrite(held, kept)
        self._choose(name)

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Put the model into a domain, and back into the one before at the end."""
        before = self.current
        self.use(name)
        try:
            yield
        finally:
            self.use(before)

    def remove(self, name: str) -> None:
        """Forget a domain that is not in use.

        Raises:
            UsageError: there is no such domain, or the model is in it.
        """
        if name not in self._modules or name == self.current:
            others = [other for other in self.names if other != self.current]
            raise UsageError(
                f"cannot remove {name!r}; the domains not in use are: {', '.join(others) or 'none'}"
            )
        del self._modules[name]

    def forward(self, x: Any) -> Any:
        """Return ``x``: a Sequential calls each of its children."""
        return x

    def extra_repr(self) -> str:
        """Which domain the model is in."""
        return f"in use: {self.current}"

    def _layers(self) -> dict[str, Any]:
        return with_statistics(self._model[0])

    @property
    def _kept(self) -> dict[str, "_Kept"]:
        kept: Any = self._modules
        return kept  # type: ignore[no-any-return]

    def _choose(self, name: str) -> None:
        for other, kept in self._kept.items():
            kept.in_use.fill_(other == name)

    def _keep(self, name: str) -> None:
        """Store what the norms hold as a domain's."""
        layers = self._layers()
        if name not in self._modules:
            self.add_module(name, _Kept(layers))
        else:
            for kept, held in self._pairs(name, layers):
                overwrite(kept, held)

    def _pairs(self, name: str, layers: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        kept = self._kept[name].tensors()
        wanted = {key: tensor for layer in layers for key, tensor in _entries(layer, layers[layer]).items()}
        if wanted.keys() != kept.keys():
            raise SurgeryError(
                f"the model's norms are not those that the domain {name} was kept for: choose the domain "
                "before you fold or replace norms"
            )
        return [(kept[key], tensor) for key, tensor in wanted.items()]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Make the domains that a state dict has, so that its entries find their places."""
        found = dict.fromkeys(
            key[len(prefix) :].split(".")[0] for key in state_dict if key.startswith(prefix)
        )
        if found:
            layers = self._layers()
            self._modules.clear()
            for name in found:
                self.add_module(name, _Kept(layers))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _before_saving(kept: Domains, *_: Any) -> None:
    with suppress(SurgeryError):  # a folded model has no such norms any more, and keeps what it knows
        kept._keep(kept.current)


class _Kept(nn.Module):
    """One domain's statistics, as buffers named after the layers, and whether it is the one in use.

    Each says so for itself: an index would depend on the order of a state dict, which safetensors sorts.
    """

    in_use: Tensor

    def __init__(self, layers: dict[str, Any]) -> None:
        super().__init__()
        self.register_buffer("in_use", torch.zeros((), dtype=torch.long))
        for name, layer in layers.items():
            for key, tensor in _entries(name, layer).items():
                self.register_buffer(key, tensor.detach().clone())

    def extra_repr(self) -> str:
        return f"{len(self.tensors())} tensors"

    def tensors(self) -> dict[str, Tensor]:
        """The statistics, by name."""
        return {name: tensor for name, tensor in self.named_buffers() if name != "in_use"}


def _entries(name: str, layer: Any) -> dict[str, Tensor]:
    """What a norm keeps, by the names of buffers, which cannot have dots."""
    entries = dict(zip(("mean", "var"), statistics(layer) or (), strict=False))
    counter = getattr(layer, "num_batches_tracked", None)
    if isinstance(counter, Tensor):
        entries["batches"] = counter
    return {f"{name.replace('.', '/')}:{key}": tensor for key, tensor in entries.items()}


def check_new(model: nn.Module, name: str) -> None:
    """Raise what ``domains(model).add(name)`` would, of a name; the model gets no domains by it."""
    kept = getattr(model, _CHILD, None)
    _check_name(name, kept.names if isinstance(kept, Domains) else [_FIRST])


def _check_name(name: str, taken: Sequence[str] = ()) -> None:
    if name in taken:
        raise UsageError(f"there is a domain {name} already: use({name!r}), or choose another name")
    if not _NAME.fullmatch(name):
        raise UsageError(f"a domain's name is made of letters, digits, _ and -, not {name!r}")
    if hasattr(Domains, name) or name == "training":  # its child could not be found under this name
        raise UsageError(f"a domain cannot be called {name!r}, which modules use themselves: choose another")
