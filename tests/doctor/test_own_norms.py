"""Batch normalization that owners wrote themselves: a measured gap is a finding, whoever made the layer."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gammabeta as gb

FEATURES, CLASSES = 6, 4


class Sums(nn.Module):
    """Counts, sums and sums of squares over all that training saw."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.tensor(1.0))
        self.register_buffer("total", torch.zeros(FEATURES))
        self.register_buffer("squares", torch.ones(FEATURES))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.seen += len(x)
                self.total += x.sum(0)
                self.squares += x.square().sum(0)
            return (x - x.mean(0)) / (x.std(0) + 1e-3)
        mean = self.total / self.seen
        return (x - mean) / ((self.squares / self.seen - mean.square()).clamp(min=0).sqrt() + 1e-3)


class Medians(nn.Module):
    """Medians and absolute deviations, in plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.width = torch.zeros(FEATURES), torch.ones(FEATURES)

    def forward(self, x):
        middle, width = self.middle, self.width
        if self.training:
            middle = x.median(0).values
            width = (x - middle).abs().median(0).values
            self.middle = 0.9 * self.middle + 0.1 * middle.detach()
            self.width = 0.9 * self.width + 0.1 * width.detach()
        return (x - middle) / (width + 1e-3)


class InNumpy(nn.Module):
    """Statistics as NumPy arrays in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = [np.zeros(FEATURES), np.ones(FEATURES)]

    def forward(self, x):
        if self.training:
            now = x.detach().mean(0), x.detach().std(0)
            self.kept = [0.9 * old + 0.1 * new.numpy() for old, new in zip(self.kept, now, strict=True)]
        else:
            now = tuple(torch.from_numpy(array).float() for array in self.kept)
        return (x - now[0]) / (now[1] + 1e-3)


class InParameters(nn.Module):
    """Statistics as parameters, moved through their data."""

    def __init__(self) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.zeros(FEATURES), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(FEATURES), requires_grad=False)

    def forward(self, x):
        if not self.training:
            return (x - self.centre) * self.scale
        self.centre.data = 0.9 * self.centre.data + 0.1 * x.detach().mean(0)
        self.scale.data = 0.9 * self.scale.data + 0.1 / (x.detach().std(0) + 1e-3)
        return (x - x.mean(0)) / (x.std(0) + 1e-3)


class Whitening(nn.Module):
    """The whole covariance, by its Cholesky factor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mu", torch.zeros(FEATURES))
        self.register_buffer("covariance", torch.eye(FEATURES))

    def forward(self, x):
        mu, covariance = self.mu, self.covariance
        if self.training:
            mu, covariance = x.mean(0), x.T.cov() + 1e-3 * torch.eye(FEATURES)
            self.mu = torch.lerp(self.mu, mu.detach(), 0.1)
            self.covariance = torch.lerp(self.covariance, covariance.detach(), 0.1)
        return torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (x - mu).T, upper=False).T


class ByHook(nn.Identity):
    """A hook that normalises what a layer gives, with statistics in a cell of its own."""

    def __init__(self) -> None:
        super().__init__()
        state = {"mean": torch.zeros(FEATURES), "std": torch.ones(FEATURES)}

        def normalise(module, _inputs, x):
            now = state["mean"], state["std"]
            if module.training:
                now = x.mean(0), x.std(0)
                state["mean"] = torch.lerp(state["mean"], now[0].detach(), 0.1)
                state["std"] = torch.lerp(state["std"], now[1].detach(), 0.1)
            return (x - now[0]) / (now[1] + 1e-3)

        self.register_forward_hook(normalise)


KINDS = [Sums, Medians, InNumpy, InParameters, Whitening, ByHook]


def data():
    generator = torch.Generator().manual_seed(3)
    y = torch.randint(0, CLASSES, (128,), generator=generator)
    x = torch.randn(CLASSES, FEATURES, generator=generator)[y] + torch.randn(
        128, FEATURES, generator=generator
    )
    return list(zip((x * 3 + 5).split(32), y.split(32), strict=True))


@pytest.mark.parametrize(
    "beside", [nn.Identity, lambda: nn.BatchNorm1d(FEATURES)], ids=["alone", "beside ours"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gap_is_found_and_gone_with_fresh_statistics(kind, beside):
    torch.manual_seed(0)
    loader, model = (
        data(),
        nn.Sequential(kind(), nn.Linear(FEATURES, FEATURES), beside(), nn.Linear(FEATURES, 4)),
    )
    optimizer = torch.optim.Adam(model[1:].parameters(), lr=0.03)
    every = [torch.cat(column) for column in zip(*loader, strict=True)]
    for _ in range(40):
        for index in torch.randperm(len(every[0])).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(every[0][index]), every[1][index]).backward()
            optimizer.step()
    healthy = gb.diagnose(model.eval(), loader, loss=F.cross_entropy)
    assert healthy.at_least("warning") == [], str(healthy)
    moved = [(x * 2 - 9, y) for x, y in loader]  # data that its statistics are not of
    sick = gb.diagnose(model, moved, loss=F.cross_entropy).at_least("warning")
    assert ("train-eval-gap", "error") in {(f.check, f.severity) for f in sick}
    assert "train-eval-gap" in {f.check for f in gb.diagnose(model, moved).at_least("warning")}
