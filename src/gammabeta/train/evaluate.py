"""Judging a model on a split: accuracy, confusion, the worst mistakes. Nothing in the model changes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..stats.preserve import preserved
from .batches import DeviceImages
from .device import Precision
from .world import ALONE, World

EVALUATION_BATCH = 500  # images per forward pass: large enough to be quick, small enough to stay in cache


@dataclass(frozen=True)
class Evaluation:
    """How a model did on a split.

    Attributes:
        correct: Images classified rightly.
        count: Images seen.
        loss: Mean cross-entropy in nats.
        confusion: int64 ``(classes, classes)``; row: true class, column: predicted class.
        probabilities: float32 ``(count, classes)``, on the CPU, if they were asked for.
    """

    correct: int
    count: int
    loss: float
    confusion: Tensor
    probabilities: Tensor | None = None

    @property
    def accuracy(self) -> float:
        """Share of images classified rightly."""
        return self.correct / self.count


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode for a while; modes and buffers come back as they were."""
    with preserved(model), torch.inference_mode():
        model.eval()
        yield


def evaluate(
    model: nn.Module,
    data: DeviceImages,
    classes: int,
    *,
    precision: Precision = "fp32",
    keep_probabilities: bool = False,
    advance: Callable[[int], None] | None = None,
    world: World = ALONE,
) -> Evaluation:
    """Evaluate the model on all images; parameters, buffers and modes stay as they are.

    Args:
        model: Maps ``(N, C, H, W)`` float32 to logits ``(N, classes)``.
        data: The images and labels.
        classes: Number of classes.
        precision: Of convolutions and matrix products.
        keep_probabilities: Return each image's class probabilities too.
        advance: Called with the number of images done since the last call.
        world: Whose ranks share the batches, each taking every so-manieth; all get the whole result, but only
            their own probabilities.
    """
    device = data.labels.device
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    kept: list[Tensor] = []
    with evaluating(model), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for start in range(world.rank * EVALUATION_BATCH, len(data), world.size * EVALUATION_BATCH):
            x, y = data.batch(slice(start, start + EVALUATION_BATCH))
            log_p = model(x).float().log_softmax(1)
            loss -= log_p.gather(1, y[:, None]).sum()
            confusion += torch.bincount(y * classes + log_p.argmax(1), minlength=classes * classes)
            if keep_probabilities:
                kept.append(log_p.exp().cpu())
            if advance is not None:
                advance(len(y))
    world.total(confusion), world.total(loss)
    table = confusion.view(classes, classes).cpu()
    return Evaluation(
        correct=int(table.diagonal().sum()),
        count=len(data),
        loss=float(loss) / max(len(data), 1),
        confusion=table,
        probabilities=torch.cat(kept) if kept else None,
    )
