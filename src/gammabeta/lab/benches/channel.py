"""Bench 3: one channel through the equations of ``reference.py``, forward and backward, with its numbers."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import reference
from ..subject import Subject
from .opened import follow, norms, rest, site

BINS, DOTS = 48, 400
ACTIVATION = "relu"


@dataclass(frozen=True)
class Lens:
    """Which channel, and by which γ, β and ε it is normalised; None: the layer's own."""

    layer: int = 0
    channel: int = 0
    gamma: float | None = None
    beta: float | None = None
    eps: float | None = None
    batch: int = 64
    draw: int = 0


def look(subject: Subject, lens: Lens) -> dict[str, Any]:
    """Carry a channel's values over one batch through the equations, and the gradient back.

    The upstream gradient is that of the mean cross-entropy of the batch, with the settings of the lens in the
    layer's place.
    """
    name, layer = norms(subject.model)[lens.layer]
    assert layer.running_mean is not None
    assert layer.running_var is not None
    channel = lens.channel % layer.num_features
    weight, bias, eps = layer.weight.clone(), layer.bias.clone(), layer.eps if lens.eps is None else lens.eps
    if lens.gamma is not None:
        weight[channel] = lens.gamma
    if lens.beta is not None:
        bias[channel] = lens.beta
    labels, before = _entering(subject, lens)
    gradient = upstream(subject, name, before, (weight, bias, eps), labels)
    one = before[:, channel : channel + 1].double()
    g = gradient[:, channel : channel + 1].double()
    gamma, beta = (float(values[channel]) for values in (weight, bias))
    steps, batch, xhat = forward(one, gamma, beta, eps)
    return {
        "layer": name,
        "channel": channel,
        "channels": layer.num_features,
        "own": {
            "gamma": float(layer.weight[channel]),
            "beta": float(layer.bias[channel]),
            "eps": layer.eps,
        },
        "gamma": gamma,
        "beta": beta,
        "eps": eps,
        "mean": float(batch.mean),
        "var": float(batch.var),
        "count": batch.count,
        "running": [float(layer.running_mean[channel]), float(layer.running_var[channel])],
        "steps": steps,
        "backward": backward(one, g, gamma, eps, xhat),
    }


def _entering(subject: Subject, lens: Lens) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(lens.draw)
    index = torch.randint(0, len(subject.test), (lens.batch,), generator=generator)
    x, labels = subject.test.batch(index)
    name, _ = norms(subject.model)[lens.layer]
    value = x
    with torch.no_grad():
        for child, layer in subject.model.named_children():
            if child == name:
                break
            value = (
                site(child, layer, value, by_batch=True).output if _is_norm(subject, child) else layer(value)
            )
    return labels, value


def _is_norm(subject: Subject, name: str) -> bool:
    return any(name == other for other, _ in norms(subject.model))


def upstream(
    subject: Subject, name: str, before: Tensor, settings: tuple[Tensor, Tensor, float], labels: Tensor
) -> Tensor:
    """∂L/∂y at a batch norm, ``(N, C, *spatial)``: L the mean cross-entropy, statistics the batch's."""
    weight, bias, eps = settings
    batch = reference.batch_statistics(before)
    xhat = reference.normalize(before, batch.mean, batch.var, eps)
    y = reference.scale_and_shift(xhat, weight, bias).detach().requires_grad_()
    value = follow(dict(subject.model.named_children())[name], y)[1]
    for child, layer in rest(subject.model, name):
        value = site(child, layer, value, by_batch=True).output if _is_norm(subject, child) else layer(value)
    (gradient,) = torch.autograd.grad(F.cross_entropy(value, labels), y)
    return gradient


def forward(
    x: Tensor, gamma: float, beta: float, eps: float
) -> tuple[list[dict[str, Any]], reference.BatchStatistics, Tensor]:
    """A channel ``(N, 1, *spatial)`` through Algorithm 1, a histogram after each step."""
    batch = reference.batch_statistics(x)
    scale = x.new_tensor([gamma])
    shift = x.new_tensor([beta])
    xhat = reference.normalize(x, batch.mean, batch.var, eps)
    values = (
        ("x", x),
        ("x − μ", x - batch.mean.view(1, -1, *[1] * (x.dim() - 2))),
        ("x̂", xhat),
        ("γ x̂", reference.scale_and_shift(xhat, scale, None)),
        ("y", reference.scale_and_shift(xhat, scale, shift)),
        ("max(y, 0)", reference.scale_and_shift(xhat, scale, shift).clamp_min(0)),
    )
    return [{"name": name, **histogram(value)} for name, value in values], batch, xhat


def histogram(values: Tensor) -> dict[str, Any]:
    """Counts in 48 bins between the least and the greatest value; mean and standard deviation (biased)."""
    flat = values.flatten()
    low, high = float(flat.min()), float(flat.max())
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(flat, BINS, low, high)
    deviation = float(flat.std(correction=0))
    return {
        "low": low,
        "high": high,
        "counts": counts.int().tolist(),
        "mean": float(flat.mean()),
        "std": deviation,
    }


def backward(x: Tensor, g: Tensor, gamma: float, eps: float, xhat: Tensor) -> dict[str, Any]:
    """What of the upstream gradient ``g`` the batch takes away: its mean, and its projection on x̂.

    The three shares of Σ g² add up to 1 where ε is small beside the variance: then 1 and x̂ are orthogonal and
    of length √m.
    """
    shift, stretch = float(g.mean()), float((g * xhat).mean())
    left = g - shift - xhat * stretch
    whole = reference.backward_training(g, x, x.new_tensor([gamma]), eps)
    total = float(g.square().sum()) or 1.0
    m = g.numel()
    chosen = torch.linspace(0, m - 1, min(DOTS, m)).long()

    def dots(value: Tensor) -> list[float]:
        return [float(f"{number:.4g}") for number in value.flatten()[chosen].tolist()]

    return {
        "mean": shift,
        "projection": stretch,
        "shares": [
            m * shift**2 / total,
            float((xhat * stretch).square().sum()) / total,
            float(left.square().sum()) / total,
        ],
        "slope": gamma / float((reference.batch_statistics(x).var + eps).sqrt()),
        "dgamma": float(whole.weight),
        "dbeta": float(whole.bias),
        "xhat": dots(xhat),
        "g": dots(g),
        "left": dots(left),
        "dx_sum": float(whole.x.sum()),
        "dx_along": float((whole.x * xhat).sum()),
    }


__all__ = ["Lens", "backward", "forward", "histogram", "look", "upstream"]
