"""What goes into the model: how many samples, whether batches are mixed, whether one is counted twice."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..doctor.checks import CHECKS
from ..doctor.checks.batches import FEW_IMAGES, TO_TELL
from ..doctor.evidence import Activity, BatchSize, Evidence, Ranks
from ..doctor.finding import Finding
from ..stats.moments import Moments
from .reading import BatchSeen

CELLS = 4  # an image is looked at as 4×4 means
MOST = 48  # numbers of a sample
ENOUGH = 6  # batches


def first_tensor(given: Any) -> Tensor | None:
    """The first floating tensor (N, …) with samples in what a model is called with."""
    if isinstance(given, Tensor):
        return given if given.is_floating_point() and given.dim() > 1 else None
    items = given.values() if isinstance(given, Mapping) else given if isinstance(given, list | tuple) else ()
    return next((found for item in items if (found := first_tensor(item)) is not None), None)


def features(x: Tensor) -> Tensor:
    """A few numbers of each sample, (N, F) float64 on the CPU: means over parts of it."""
    x = x.detach()
    if x.dim() == 4 and x.shape[1] * CELLS**2 <= 4 * MOST:
        x = torch.nn.functional.adaptive_avg_pool2d(x.float(), CELLS)
    elif x.dim() > 2:
        x = x.flatten(2).float().mean(2)
    x = x.flatten(1)
    return x[:, :: max(1, -(-x.shape[1] // MOST))].to("cpu", torch.float64)


class Batches:
    """Collects what the batches show, in the form that the doctor's checks read."""

    def __init__(self) -> None:
        self.sizes: list[int] = []  # samples of the batches looked at
        self.input: Activity | None = None
        self.layers: dict[str, Activity] = {}
        self.values: dict[str, Counter[BatchSize]] = {}

    def see_input(self, x: Tensor) -> None:
        """A batch as the model is given it."""
        self.sizes.append(len(x))
        rows = features(x)
        if not bool(rows.isfinite().all()):
            return
        if self.input is None or len(self.input.image_means.mean) != rows.shape[1]:
            self.input = Activity(rows.shape[1])
        means = Moments.of_rows(rows)
        self.input.image_means.pool(means)
        self.input.image_means_within = self.input.image_means_within + means.m2
        self.input.eval_batches += 1
        self.input.population.pool(means)

    def see_layer(self, name: str, seen: BatchSeen) -> None:
        """A layer's batch."""
        activity = self.layers.setdefault(name, Activity(len(seen.mean)))
        activity.batch_means.pool(Moments.of_rows(seen.mean[None]))
        activity.batch_variances.pool(Moments.of_rows(seen.var[None]))
        spread = activity.batch_variances.mean
        activity.population = Moments(1, activity.batch_means.mean, spread.clamp(min=0))

    def findings(self, evidence: Evidence, world: int) -> Iterator[Finding]:
        """What the doctor's checks of batches say by now."""
        if len(self.sizes) < ENOUGH:
            return
        activity = dict(self.layers)
        for name, sizes in self.values.items():
            found = activity.setdefault(name, Activity(1))
            found.sizes = sizes
            if not found.population.count:
                found.population = Moments(1, torch.ones(1).double(), torch.ones(1).double())
        for found in activity.values():
            if not found.sizes:
                found.sizes = Counter({BatchSize(self.sizes[0], 1 << 30): 1})
        evidence = replace(evidence, activity=activity, batch_images=tuple(self.sizes))
        if min(self.sizes) >= FEW_IMAGES or self._told_apart():
            yield from run_check("tiny-batch", evidence)
        if world > 1:
            ranked = replace(evidence, ranks=Ranks(world, ()))
            yield from run_check("unsynchronized-replicas", ranked)
        if self.input is not None and self.input.eval_batches >= ENOUGH and evidence.layers:
            whole = replace(evidence.layers[0], name="")
            inputs = replace(evidence, layers=[whole], activity={"": self.input})
            for finding in run_check("non-iid-batches", inputs):
                yield replace(finding, evidence=f"in the model's input {finding.evidence}")

    def _told_apart(self) -> bool:
        """Whether enough batches of the layers were seen to say how uncertain their statistics are."""
        return any(found.batch_means.count >= TO_TELL for found in self.layers.values())


def run_check(code: str, evidence: Evidence) -> Iterator[Finding]:
    """The findings of one of the doctor's checks."""
    for finding in CHECKS[code].function(evidence):
        yield replace(finding, check=code)
