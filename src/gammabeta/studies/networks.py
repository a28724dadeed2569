"""The networks of several studies: perceptrons and small convolutional networks, with any norm or none."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

Norm = Callable[[int], nn.Module]


def perceptron(
    sizes: Sequence[int], norm: Norm | None, activation: Callable[[], nn.Module] = nn.ReLU
) -> nn.Sequential:
    """Linear, norm and activation for each pair of sizes but the last, which is the layer of logits."""
    steps: list[nn.Module] = [nn.Flatten()]
    for a, b in pairwise(sizes[:-1]):
        steps.append(nn.Linear(a, b, bias=norm is None))
        steps += [activation()] if norm is None else [norm(b), activation()]
    return nn.Sequential(*steps, nn.Linear(sizes[-2], sizes[-1]))


def convolutions(
    channels: Sequence[int],
    norm: Norm | None,
    before: Norm | None = None,
    halved: Sequence[int] = (1, 3),
) -> nn.Sequential:
    """3 × 3 convolutions, each with norm and ReLU; mean; ten logits.

    ``before`` makes what stands before each norm, a dropout say; the convolutions ``halved``, counted from
    0, have the stride 2.
    """
    steps: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise((1, *channels))):
        convolution = nn.Conv2d(a, b, 3, stride=2 if i in halved else 1, padding=1, bias=norm is None)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        steps.append(convolution)
        steps += [make(b) for make in (before, norm) if make is not None]
        steps.append(nn.ReLU())
    return nn.Sequential(*steps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 10))
