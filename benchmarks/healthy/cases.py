"""A healthy model as its owner has it: trained to the end, with the data that it was trained on."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 4
Objective = Callable[[Any, Any], Tensor]  # of a model and a batch


@dataclass
class Given:
    """What is given to ``diagnose``: a model, its data, and further arguments by name."""

    model: nn.Module
    loader: Iterable[Any]
    options: dict[str, Any] = field(default_factory=dict)


OWN: dict[str, Callable[[], Given]] = {}


def own(name: str) -> Callable[[Callable[[], Given]], Callable[[], Given]]:
    """Register a case under its name."""

    def register(make: Callable[[], Given]) -> Callable[[], Given]:
        OWN[name] = make
        return make

    return register


def classified(*shape: int, samples: int = 512) -> tuple[Tensor, Tensor]:
    """Samples (N, *shape) around one centre for each class, and their classes (N,)."""
    generator = torch.Generator().manual_seed(11)
    labels = torch.randint(0, CLASSES, (samples,), generator=generator)
    centres = torch.randn(CLASSES, *shape, generator=generator)
    return centres[labels] + torch.randn(samples, *shape, generator=generator), labels


class Shuffled:
    """Columns in batches, in another order each time; the last batch may be smaller."""

    def __init__(
        self, *columns: Any, size: int = 32, form: Callable[..., Any] = lambda *parts: parts
    ) -> None:
        self.columns, self.size, self.form = columns, size, form

    def __iter__(self) -> Iterator[Any]:
        for index in torch.randperm(len(self.columns[0])).split(self.size):
            yield self.form(*(_rows(column, index) for column in self.columns))


def _rows(column: Any, index: Tensor) -> Any:
    return column[index] if isinstance(column, Tensor) else [column[i] for i in index.tolist()]


def alone(x: Tensor) -> Tensor:
    """The form of a batch that is its input."""
    return x


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """The usual objective, of ``(input, classes)``."""
    return F.cross_entropy(model(batch[0]), batch[1])


def train(
    model: nn.Module, loader: Iterable[Any], objective: Objective = cross_entropy, *, passes: int = 8
) -> nn.Module:
    """Adam with a learning rate that falls linearly to zero, so that running averages catch up."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    total = passes * sum(1 for _ in loader)
    for step, batch in enumerate(batch for _ in range(passes) for batch in loader):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / total)
        optimizer.zero_grad()
        torch.autograd.backward(objective(model, batch))
        optimizer.step()
    return model.eval()


def classifier(model: nn.Module, loader: Iterable[Any], **options: Any) -> Given:
    """Trained, and diagnosed with its loss."""
    return Given(train(model, loader), loader, {"loss": F.cross_entropy, **options})
