"""One seed of a study: its images, its networks, and the plain loop that trains them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import Dataset, load

_JUDGED = 1000  # images of a batch in evaluation


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent with momentum; the rate falls evenly to zero if ``anneal``."""

    steps: int
    batch: int
    rate: float
    momentum: float = 0.9
    decay: float = 0.0
    anneal: bool = True


@dataclass(frozen=True)
class Images:
    """Images ``(N, 1, H, W)`` float32 of mean 0 and deviation 1 over the training images, labels ``(N,)``."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    def batches(self, size: int, count: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """The first ``count`` training images in their order, as a loader; the last batch may be smaller."""
        return list(zip(self.x[:count].split(size), self.y[:count].split(size), strict=True))


class Trial:
    """One seed: what is random in it follows from the seed and from nothing else."""

    def __init__(
        self, seed: int, dataset: Dataset | None, ticked: Callable[[int], object] | None = None
    ) -> None:
        self.seed = seed
        self._dataset = dataset
        self._ticked = ticked or (lambda steps: None)

    @contextmanager
    def random(self, purpose: int = 0) -> Iterator[None]:
        """Begin the random numbers of a purpose anew: two networks made so begin alike."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * self.seed + purpose)
            yield

    def images(self, train: int, test: int, *, half: bool = False, digits: bool = False) -> Images:
        """So many training and test images, drawn by the seed; ``half``: of half the side, means of 2 × 2.

        They are the study's own, or with ``digits`` those of MNIST.
        """
        dataset = load("mnist") if digits else self._dataset
        assert dataset is not None  # a study that asks for images says which
        parts: list[Tensor] = []
        order = torch.Generator().manual_seed(self.seed)
        for split, count in ((dataset.train, train), (dataset.test, test)):
            chosen = torch.randperm(len(split), generator=order)[:count].numpy()
            x = torch.from_numpy(split.images[chosen][:, :1]).float() / 255
            parts += [F.avg_pool2d(x, 2) if half else x, torch.from_numpy(split.labels[chosen])]
        mean, deviation = parts[0].mean(), parts[0].std()
        return Images((parts[0] - mean) / deviation, parts[1], (parts[2] - mean) / deviation, parts[3])

    def train(
        self,
        model: nn.Module,
        images: Images,
        sgd: Sgd,
        *,
        watch: Callable[[int], object] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        order: int = 1,
    ) -> list[float]:
        """Train a model in place; returns the loss of every step, and ends at one that is not finite.

        ``watch`` is called with the number of steps taken, after each of them and before the first, in
        whatever mode the model is; it may change the mode, the loop sets training again. The order of the
        images follows from the seed and ``order``: networks trained with the same see the same batches.
        """
        if optimizer is None:
            settings: dict[str, Any] = {"momentum": sgd.momentum, "weight_decay": sgd.decay}
            optimizer = torch.optim.SGD(model.parameters(), lr=sgd.rate, **settings)
        losses: list[float] = []
        with self.random(order):
            batches = _batches(len(images.y), sgd.batch)
            for step in range(sgd.steps):
                if watch is not None:
                    watch(step)
                if sgd.anneal:
                    for group in optimizer.param_groups:
                        group["lr"] = sgd.rate * (1 - step / sgd.steps)
                model.train()
                index = next(batches)
                loss = F.cross_entropy(model(images.x[index]), images.y[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                self._ticked(1)
                if not loss.isfinite():
                    return losses
            if watch is not None:
                watch(sgd.steps)
        return losses


def _batches(count: int, size: int) -> Iterator[Tensor]:
    """Indices of batches without end: whole ones only, every image once an epoch."""
    size = min(size, count)
    while True:
        yield from torch.randperm(count)[: count - count % size].split(size)


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """The model's outputs in evaluation mode; its mode is then what it was."""
    training = model.training
    model.eval()
    out = torch.cat([model(part) for part in x.split(_JUDGED)])
    model.train(training)
    return out


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of ``x`` that a model in evaluation mode names ``y``."""
    return 100 * (outputs(model, x).argmax(1) == y).float().mean().item()


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Cross-entropy (nats) of a model in evaluation mode."""
    return F.cross_entropy(outputs(model, x), y).item()


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn."""
    return [p for p in model.parameters() if p.requires_grad]


def layers(model: nn.Module, kind: Any = nn.modules.batchnorm._BatchNorm) -> list[Any]:
    """A model's batch norms, or its modules of another kind, in order."""
    return [module for module in model.modules() if isinstance(module, kind)]
