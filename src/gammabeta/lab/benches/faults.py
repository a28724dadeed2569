"""What goes wrong with batch normalization in life, made small: each a layer or a habit of a training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import nn as gbnn


@dataclass(frozen=True)
class Fault:
    """One switch of the bench.

    Attributes:
        key: its name in settings.
        title: what the switch says.
        story: how it happens, in a sentence or two.
        checks: the doctor's checks of which at least one must name it.
    """

    key: str
    title: str
    story: str
    checks: tuple[str, ...]


FAULTS = (
    Fault(
        "updates_in_eval",
        "Evaluation that updates",
        "The layer keeps averaging while the model is judged: the test images leak into it, and an answer "
        "depends on what was asked before.",
        ("eval-mutates",),
    ),
    Fault(
        "batches_of_two",
        "Batches of two",
        "Memory was short. Mean and variance of two images are a rough guess, and a different one each step.",
        ("tiny-batch",),
    ),
    Fault(
        "unshuffled",
        "Unshuffled classes",
        "The images come sorted by class, so each batch shows one digit, "
        "and its statistics give the digit away.",
        ("non-iid-batches",),
    ),
    Fault(
        "other_momentum",
        "Momentum from another framework",
        "0.99 was copied from Keras, where it weighs the old value. In PyTorch it weighs the new one: the "
        "running statistics are those of the last batch.",
        ("momentum",),
    ),
    Fault(
        "nan_batch",
        "A NaN batch",
        "One batch is not a number (NaN). The step was skipped, as mixed precision does, but the running "
        "statistics have already seen it.",
        ("invalid-statistics",),
    ),
    Fault(
        "dropout_before",
        "Dropout before batch norm",
        "Dropout makes the variance larger in training than in evaluation, and the layer after it learns the "
        "larger one (Li et al. 2019).",
        ("dropout-before-bn",),
    ),
    Fault(
        "never_updated",
        "Statistics never updated",
        "A hand-written layer normalises with the batch and forgets to keep averages. Evaluation uses the "
        "initial mean 0 and variance 1.",
        ("never-updated",),
    ),
    Fault(
        "one_frozen",
        "One layer frozen",
        "eval() was called on the second layer after the start, as for fine-tuning, but its γ and β go on "
        "learning, and so do the weights before it.",
        ("partly-frozen",),
    ),
)
KEYS = tuple(fault.key for fault in FAULTS)


class _UpdatesInEval(gbnn.BatchNorm2d):
    """A batch norm that also averages in evaluation."""

    def forward(self, input: Tensor, *rest: Any, **more: Any) -> Tensor:
        if not self.training and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                var, mean = torch.var_mean(input, (0, 2, 3))
                self.running_mean.lerp_(mean, 0.1)
                self.running_var.lerp_(var, 0.1)
        return super().forward(input, *rest, **more)


class _NeverUpdated(nn.BatchNorm2d):
    """A batch norm whose training forgets the running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        return super().forward(x)


def build(faults: frozenset[str], seed: int = 0) -> nn.Sequential:
    """The notebook's network with the faults that lie in its layers."""
    settings: dict[str, Any] = {
        "momentum": 0.99 if "other_momentum" in faults else 0.1,
        "skip_nonfinite": "nan_batch" not in faults,  # our layers leave such a batch out; PyTorch's do not
    }

    def second(features: int) -> list[nn.Module]:
        if "never_updated" in faults:
            return [_NeverUpdated(features, momentum=settings["momentum"]), nn.ReLU(), nn.AvgPool2d(2)]
        kind = _UpdatesInEval if "updates_in_eval" in faults else gbnn.BatchNorm2d
        return [kind(features, activation="relu", pool=2, **settings)]

    dropout: list[nn.Module] = [nn.Dropout(0.5)] if "dropout_before" in faults else []
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(1, 20, 3, bias=False)),
        ("bn1", gbnn.BatchNorm2d(20, activation="relu", pool=2, **settings)),
        ("conv2", nn.Conv2d(20, 50, 5, bias=False)),
        *zip(("bn2", "relu2", "pool2"), second(50), strict=False),
        ("flat", nn.Flatten()),
        ("fc1", nn.Linear(800, 128, bias=False)),
        *(("drop", layer) for layer in dropout),
        ("bn3", gbnn.BatchNorm1d(128, activation="relu", **settings)),
        ("fc2", nn.Linear(128, 10)),
    ]
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential()
    for name, layer in layers:
        model.add_module(name, layer)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


Order = Callable[[int], Tensor]


def order_of(faults: frozenset[str], labels: Tensor, batch: int, seed: int) -> Order:
    """Which images each step takes: mixed, or each batch of one class, the classes in turn."""
    by_class = [torch.nonzero(labels == c).flatten() for c in range(int(labels.max()) + 1)]

    def indices(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        if "unshuffled" not in faults:
            return torch.randint(0, len(labels), (batch,), generator=generator)
        pool = by_class[step % len(by_class)]
        return pool[torch.randint(0, len(pool), (batch,), generator=generator)]

    return indices
