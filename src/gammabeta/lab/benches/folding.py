"""Bench 6: batch norms folded into the weights before them; it changes nothing but the last bits."""

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ...folding import fold
from ..subject import Subject
from .opened import norms, packed

EXAMPLE = 64  # images on which the fold is verified
PAIRS = {"bn1": "conv1", "bn2": "conv2", "bn3": "fc1"}  # of `DigitNetwork`: which layer is folded into


@dataclass(frozen=True, eq=False)
class Folded:
    """A network and its folded copy."""

    subject: Subject
    model: nn.Module
    plain: nn.Module  # folded, its weights not reordered for the CPU: to be looked at

    @classmethod
    def of(cls, subject: Subject) -> "Folded":
        """Fold the network of a subject, verified on test images."""
        x = subject.test.batch(slice(0, EXAMPLE))[0]
        return cls(subject, fold(subject.model, x), fold(subject.model, x, pack=False))

    def weights(self, layer: int, channel: int) -> dict[str, Any]:
        """One channel's weights before and after, and the numbers of the batch norm between."""
        name, norm = norms(self.subject.model)[layer]
        before = self.subject.model.get_submodule(PAIRS[name])
        after = self.plain.get_submodule(PAIRS[name])
        channel %= norm.num_features
        assert norm.running_mean is not None
        assert norm.running_var is not None
        gamma, beta = float(norm.weight[channel]), float(norm.bias[channel])
        mean, var = float(norm.running_mean[channel]), float(norm.running_var[channel])
        return {
            "layer": PAIRS[name],
            "norm": name,
            "channel": channel,
            "channels": norm.num_features,
            "gamma": gamma,
            "beta": beta,
            "mean": mean,
            "var": var,
            "eps": norm.eps,
            "factor": gamma / (var + norm.eps) ** 0.5,
            "bias": [_bias(before, channel), _bias(after, channel)],
            "before": packed(_filter(before, channel)),
            "after": packed(_filter(after, channel)),
        }

    def difference(self, first: int, count: int) -> dict[str, Any]:
        """The logits of some test images before and after: the largest difference, and one image's bits."""
        start = first % len(self.subject.test)
        x, _ = self.subject.test.batch(slice(start, start + count))
        with torch.no_grad():
            a, b = self.subject.model(x), self.model(x)
        return {
            "images": len(x),
            "largest": float((a - b).abs().max()),
            "size": float(a.abs().max()),
            "same_answers": int((a.argmax(1) == b.argmax(1)).sum()),
            "rows": [
                {"before": p.hex(), "after": q.hex(), "value": p, "difference": q - p, "ulps": steps}
                for p, q, steps in zip(a[0].tolist(), b[0].tolist(), ulps(a[0], b[0]).tolist(), strict=True)
            ],
        }

    def times(self, rounds: int = 30) -> dict[str, float]:
        """Median milliseconds of one image, evaluation and folded in turn."""
        x = self.subject.test.batch(slice(0, 1))[0]
        taken: dict[str, list[float]] = {"before": [], "after": []}
        with torch.inference_mode():
            for number in range(rounds + 5):
                for key, model in (("before", self.subject.model), ("after", self.model)):
                    clock = time.perf_counter()
                    model(x)
                    if number >= 5:
                        taken[key].append(1000 * (time.perf_counter() - clock))
        return {key: median(values) for key, values in taken.items()}


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many float32 numbers lie between each pair, signed: units in the last place."""
    return _ordered(b) - _ordered(a)


def _ordered(x: Tensor) -> Tensor:
    """Float32 as integers in the order of the numbers."""
    bits = x.contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _filter(layer: nn.Module, channel: int) -> Tensor:
    """A channel's weights as maps: (inputs, height, width), or of a linear layer its rows of pixels."""
    weight = layer.weight[channel].detach()  # type: ignore[index]
    assert isinstance(weight, Tensor)
    return (
        weight
        if weight.dim() == 3
        else weight.reshape(-1, 4, 4)
        if len(weight) % 16 == 0
        else weight[None, None]
    )


def _bias(layer: nn.Module, channel: int) -> float:
    bias = layer.bias
    return 0.0 if bias is None else float(bias[channel])  # type: ignore[index]
