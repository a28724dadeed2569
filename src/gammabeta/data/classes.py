"""Classes of one data set found again among those of another, by their names."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np

from ..errors import DataError
from .dataset import Dataset

_NUMBER = re.compile(r"[+-]?\d{1,18}(\.\d{1,18})?")
_SHOWN = 40  # names of a list that a message shows


def as_classes(dataset: Dataset, classes: Sequence[str], whose: str) -> Dataset:
    """The data set with labels that mean ``classes``, which ``whose`` has, whatever order its own have.

    Names that are the same text are matched first; then texts that differ in Unicode's normal form, then
    numbers by their value (``07`` is ``7``), then texts that differ in case. All but the first are noted.

    Raises:
        DataError: images have a class that is not among ``classes``, or that could be several of them; both
            lists are named.
    """
    if dataset.classes == tuple(classes):
        return dataset
    used = np.unique(np.concatenate([split.labels for split in dataset.splits().values()]))
    found, notes = match([dataset.classes[label] for label in used], classes, (dataset.name, whose))
    table = np.zeros(len(dataset.classes), np.int64)
    table[used] = found
    notes = [f"{dataset.name}: {note}" for note in notes]
    splits: dict[str, Any] = {
        part: replace(split, labels=table[split.labels]) for part, split in dataset.splits().items()
    }
    return replace(dataset, **splits, classes=tuple(classes), notes=(*dataset.notes, *notes))


def match(
    names: Sequence[str], classes: Sequence[str], whose: tuple[str, str]
) -> tuple[list[int], list[str]]:
    """For each of ``names`` its place among ``classes``, and a note for each way in which names differ.

    ``whose`` says in an error whose names these are, and whose classes.
    """
    places: dict[str, int] = {}
    notes = []
    for key, difference in _KEYS.items():
        ours = defaultdict(list)
        for place, name in enumerate(classes):
            ours[key(name)].append(place)
        taken = set(places.values())
        free = {name: [at for at in ours[key(name)] if at not in taken] for name in names}
        found = {name: at[0] for name, at in free.items() if name not in places and len(at) == 1}
        if found and difference:
            pairs = [f"{name} = {classes[at]}" for name, at in found.items()]
            notes.append(f"classes are matched by name though {difference}: {_few(pairs)}")
        places |= found
    lost = [name for name in names if name not in places]
    if lost or len(set(places.values())) < len(names):
        twice = [name for name in names if list(places.values()).count(places.get(name, -1)) > 1]
        raise DataError(
            f"{whose[0]}: {_list(lost or twice)} cannot be matched by name with one class each of "
            f"{whose[1]}, which has {_list(classes)}; the data have {_list(names)}; name them alike"
        )
    return [places[name] for name in names], notes


def _same(name: str) -> Hashable:
    return name


def _composed(name: str) -> Hashable:
    return unicodedata.normalize("NFC", name)


def _value(name: str) -> Hashable:
    return Decimal(name.strip()) if _NUMBER.fullmatch(name.strip()) else _composed(name)


def _folded(name: str) -> Hashable:
    value = _value(name)
    return unicodedata.normalize("NFC", value.casefold()) if isinstance(value, str) else value


#: How names are compared, one way after the other, and what differs between those that a way calls equal.
_KEYS: dict[Callable[[str], Hashable], str] = {
    _same: "",
    _composed: "their Unicode normal forms differ",
    _value: "the numbers are written differently",
    _folded: "upper and lower case differ",
}


def _list(names: Sequence[str]) -> str:
    return _few([*map(repr, names)])


def _few(texts: Sequence[str]) -> str:
    more = f", … and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more
