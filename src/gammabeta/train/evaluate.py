"""Measuring a model, which changes nothing in it.

``evaluate`` gives accuracy, loss and confusion on a split. ``layer_statistics`` gives what each batch-norm
layer does on one batch; the percentiles of what enters each activation are those of Ioffe and Szegedy (2015),
figure 1 (b) and (c).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..graph.layers import batch_norm_layers
from ..stats.moments import batch_moments
from ..stats.observe import observed
from ..stats.preserve import preserved
from .batches import DeviceImages
from .world import ALONE, Precision, World

EVALUATION_BATCH = 500  # images per forward pass: large enough to be quick, small enough to stay in cache …
_PIXELS = EVALUATION_BATCH * 32 * 32  # … and fewer of large ones: layers hold some 100 bytes a pixel
LEVELS = (0.15, 0.5, 0.85)  # of the percentiles
_MOST = 25_000  # values a percentile is taken from, to a hundredth of a deviation: a picture shows no more


@dataclass(frozen=True)
class Evaluation:
    """How a model did on a split of ``count`` images, ``correct`` of them classified rightly."""

    correct: int
    count: int
    loss: float  # mean cross-entropy in nats
    confusion: Tensor  # int64 (classes, classes); row: true class, column: predicted class
    probabilities: Tensor | None = None  # float32 (count, classes), on the CPU, if they were asked for

    @property
    def accuracy(self) -> float:
        """Share of images classified rightly."""
        return self.correct / self.count

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy:.4f} ({self.correct:,} of {self.count:,} images), loss {self.loss:.4f}"
        )

    def by_class(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """For each class how many images it has, how many were predicted and correct, and shares.

        ``accuracy``: of all images, those rightly taken for this class or for another; ``precision``: of
        those predicted, the correct ones; ``recall``: of its own images, the correct ones; ``f1``: the
        harmonic mean of both. None where there are none.
        """
        correct = self.confusion.diagonal().tolist()
        counts, predicted = self.confusion.sum(1).tolist(), self.confusion.sum(0).tolist()
        return [
            {
                "class": name,
                "count": count,
                "predicted": guessed,
                "correct": right,
                "accuracy": 1 - (count + guessed - 2 * right) / max(self.count, 1),
                "precision": right / guessed if guessed else None,
                "recall": right / count if count else None,
                "f1": 2 * right / (count + guessed) if count + guessed else None,
            }
            for name, count, guessed, right in zip(classes, counts, predicted, correct, strict=True)
        ]


def evaluation_batch(height: int, width: int) -> int:
    """How many images of this size go through the network at once."""
    return max(1, min(EVALUATION_BATCH, _PIXELS // (height * width)))


def worst_mistakes(result: Evaluation, labels: np.ndarray, most: int) -> tuple[Tensor, int]:
    """Of the images taken for another class, those whose own seemed least likely, and how many there are.

    ``result`` has the probabilities; ``labels``, int64 ``(count,)``, are the true classes.
    """
    assert result.probabilities is not None
    true = torch.from_numpy(labels)
    wrong = (result.probabilities.argmax(1) != true).nonzero().flatten()
    return wrong[result.probabilities[wrong, true[wrong]].argsort()][:most], len(wrong)


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
    keep_probabilities: bool = False,
    world: World = ALONE,
) -> Evaluation:
    """Evaluate the model on all images; parameters, buffers and modes stay as they are.

    The model maps ``(N, C, H, W)`` float32 to logits ``(N, classes)``, and computes in float32 whatever
    precision it was trained in: a training, ``evaluate``, ``predict`` and an exported file then find one
    accuracy. The ranks of ``world`` divide the batches among them; each gets the whole result, but
    only the probabilities of its own batches.
    """
    device = data.labels.device
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    kept: list[Tensor] = []
    with evaluating(model):
        batch = evaluation_batch(*data.size)
        for start in range(world.rank * batch, len(data), world.size * batch):
            x, y = data.batch(slice(start, start + batch))
            log_p = model(x).float().log_softmax(1)
            loss -= log_p.gather(1, y[:, None]).sum()
            confusion += torch.bincount(y * classes + log_p.argmax(1), minlength=classes * classes)
            if keep_probabilities:
                kept.append(log_p.exp().cpu())
    world.all_reduce(confusion), world.all_reduce(loss)
    table = confusion.view(classes, classes).cpu()
    return Evaluation(
        correct=int(table.diagonal().sum()),
        count=len(data),
        loss=float(loss) / max(len(data), 1),
        confusion=table,
        probabilities=torch.cat(kept) if kept else None,
    )


@dataclass(frozen=True)
class LayerStatistics:
    """One layer on one batch; scalars are means over the channels unless said otherwise.

    ``mean_distance``: root mean square over the channels of batch mean − running mean, in running standard
    deviations; None without running statistics. ``var_distance``: the same of ln(batch variance, unbiased /
    running variance).
    """

    mean: float
    var: float  # biased
    mean_distance: float | None
    var_distance: float | None
    percentiles: tuple[float, float, float]  # 15th, 50th and 85th, of what enters the activation: γ x̂ + β


def layer_statistics(
    model: nn.Module, x: Tensor, precision: Precision = "fp32"
) -> dict[str, LayerStatistics]:
    """Measure every batch-norm layer of a model in training mode on ``x``; the model is left as it was."""
    found: dict[str, LayerStatistics] = {}

    def measure(name: str, layer: Any, inputs: Tensor) -> None:
        found.setdefault(name, _measure(layer, inputs.detach()))

    with (
        observed(model, batch_norm_layers(model), measure),
        preserved(model),
        torch.no_grad(),
        torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"),
    ):
        model.train()
        model(x)
    return found


def _measure(layer: _BatchNorm, x: Tensor) -> LayerStatistics:
    whole = batch_moments(x).whole
    var, mean = whole.variance.float().to(x.device), whole.mean.float().to(x.device)
    distances = _distances(layer, mean, var, whole.count)
    values = x.movedim(1, -1).reshape(-1, x.shape[1])  # a row for each pixel
    some = values[:: -(-values.numel() // _MOST) | 1]  # an odd step: no even width repeats in it
    normal = (some.float() - mean) * (var + layer.eps).rsqrt()
    if layer.weight is not None:
        normal = normal * layer.weight.detach().float()
    if layer.bias is not None:
        normal = normal + layer.bias.detach().float()
    low, middle, high = normal.flatten().quantile(torch.tensor(LEVELS, device=normal.device)).tolist()
    return LayerStatistics(float(mean.mean()), float(var.mean()), *distances, (low, middle, high))


def _distances(layer: _BatchNorm, mean: Tensor, var: Tensor, count: int) -> tuple[float | None, float | None]:
    if layer.running_mean is None or layer.running_var is None:
        return None, None
    spread = (layer.running_var.float() + layer.eps).sqrt()
    shift = (mean - layer.running_mean.float()) / spread
    unbiased = var * (count / max(count - 1, 1))
    ratio = ((unbiased + layer.eps) / spread.square()).log()
    return float(shift.square().mean().sqrt()), float(ratio.square().mean().sqrt())
