"""What the readings of a training show that one look at a model cannot: each rule is about one layer."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..doctor.finding import Finding
from ..graph.layers import BatchNormLayer
from .reading import BatchSeen, Reading, batch_between

FEW = 0.1  # of a layer's channels, as in the doctor's checks
TWICE = 2  # readings that must agree
IDLE = 10  # steps
GROWN = 1e4  # times the variance at the start


class Course:
    """One batch norm over the training: feed it readings, it yields findings, each code at most once."""

    def __init__(self, name: str, layer: BatchNormLayer, index: int) -> None:
        self.name, self.layer, self.index = name, layer, index
        self.first: BatchSeen | None = None
        self.alive = torch.zeros(0, dtype=torch.bool)
        self.low = self.grown = 0  # readings in a row
        self.per_forward: int | None = None  # updates per forward pass, once two stretches agree
        self.regular = 0
        self.trained = False  # it was updated while we looked
        self.held = False  # it was in evaluation, in a model in training, when we began
        self.idle = 0
        self.affine: tuple[Tensor, ...] = ()

    def begin(self, reading: Reading, training: bool) -> None:
        """The first reading; ``training``: whether the model as a whole was in training."""
        self.held = not reading.training[self.index] and training

    def look(self, old: Reading, new: Reading, forwards: int) -> Iterator[Finding]:
        """Compare two readings, between which the model was run ``forwards`` times in training."""
        updates = new.counts[self.index] - old.counts[self.index]
        for finding in (
            *self._frozen(updates, new),
            *self._stalled(old, new, updates, forwards),
            *self._counted(updates, forwards, new),
            *self._batch(old, new),
        ):
            yield replace(finding, layer=self.name)
        self.trained |= updates > 0

    def _frozen(self, updates: int, new: Reading) -> Iterator[Finding]:
        """A layer held still when we began, and updated now, though nothing was said to learn again."""
        if self.held and updates > 0 and new.training[self.index]:
            yield Finding(
                "warning",
                f"frozen when the training began, its running statistics were updated by step {new.step}",
                "model.train() sets every layer to training, also those that were set to eval() before",
                "call eval() on the layer after each train(), or convert it to FrozenBatchNorm",
                check="partly-frozen",
            )

    def _stalled(self, old: Reading, new: Reading, updates: int, forwards: int) -> Iterator[Finding]:
        """Updates are counted and the statistics do not move, not by a bit."""
        index = self.index
        same = torch.equal(old.mean[index], new.mean[index]) and torch.equal(old.var[index], new.var[index])
        if updates > 0 and forwards > 0 and same:
            self.idle += 1
            if self.idle >= TWICE:
                yield Finding(
                    "warning",
                    f"{updates} updates were counted up to step {new.step}, and no running statistic changed",
                    "momentum 0, buffers that other code sets back each step, or the same batch for ever",
                    "set momentum to 0.1; look for load_state_dict or a moving average that writes buffers",
                    check="never-updated",
                )
        else:
            self.idle = 0

    def _counted(self, updates: int, forwards: int, new: Reading) -> Iterator[Finding]:
        """Fewer updates than passes, in a layer that had as many as passes before: batches left out."""
        if forwards < 1 or not new.training[self.index] or not getattr(self.layer, "skip_nonfinite", False):
            return
        if self.per_forward is None or self.regular < TWICE:
            if updates and updates % forwards == 0:
                each = updates // forwards
                self.regular = self.regular + 1 if each == self.per_forward else 1
                self.per_forward = each
            elif updates:
                self.regular = -1_000_000  # a layer that is skipped at random
            return
        missing = self.per_forward * forwards - updates
        if missing > 0:
            yield Finding(
                "warning",
                f"{missing} of {self.per_forward * forwards} batches up to step {new.step} did not enter the"
                " running statistics: their mean or variance was not finite",
                "NaN or infinity in the data, or activations that overflow",
                "look for the batch: torch.isfinite(x).all(); a lower learning rate if the loss is NaN, too",
                {"left_out": missing},
                check="invalid-statistics",
            )

    def _batch(self, old: Reading, new: Reading) -> Iterator[Finding]:
        """The batch's own variance: collapsed, dead or run away since the beginning."""
        if new.step != old.step + 1:
            return
        seen = batch_between(self.layer, old, new, self.index)
        if seen is None or not bool(seen.var.isfinite().all()):
            return
        eps = max(self.layer.eps, 1e-12)
        limit = torch.maximum(seen.floor, torch.full_like(seen.floor, eps))
        if self.first is None:
            self.first, self.alive = seen, seen.var > 10 * limit
            return
        yield from self._collapsed(seen, limit)
        usual, at_first = float(seen.var.median()), float(self.first.var.median())
        self.grown = self.grown + 1 if usual > GROWN * max(at_first, eps) else 0
        if self.grown == TWICE:
            yield Finding(
                "warning",
                f"the variance of its input is {usual:.2g}, {usual / max(at_first, eps):.1g} times that of"
                " the first steps (median over channels)",
                "weights that run away: a learning rate too high for what stands before this layer",
                "a lower learning rate or a warm-up; weight decay on the weights before the layer",
                {"variance": usual, "first": at_first},
                check="exploding-variance",
            )

    def _collapsed(self, seen: BatchSeen, limit: Tensor) -> Iterator[Finding]:
        low = self.alive & (seen.var < limit)
        count = int(low.sum())
        self.low = self.low + 1 if count >= FEW * len(low) and count else 0
        if self.low == TWICE:
            dead = int((low & (seen.var.abs() <= seen.floor)).sum())
            what = f"{dead} of them constant" if dead else "none of them quite constant"
            yield Finding(
                "warning",
                f"in {count} of {len(low)} channels the variance of the batch fell under eps"
                f" {self.layer.eps:g} since the first steps, {what}",
                "weights that shrink to zero, or a ReLU before that is always off: a step too large",
                "a lower learning rate or a warm-up; less weight decay; look at what produces the channels",
                {"channels": count, "dead": dead},
                check="dead-input" if dead >= FEW * len(low) else "collapsed-variance",
            )
