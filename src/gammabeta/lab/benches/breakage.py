"""Bench 5: train a network with a fault, watch train() and eval() part, diagnose it, and mend it."""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...doctor.diagnosis import diagnose
from ...doctor.report import Report
from ...errors import GammabetaError
from ...stats.preserve import preserved
from ...stats.recalibrate import recalibrate
from ...train.batches import DeviceImages
from .faults import build, order_of

BATCH, RATE, MOMENTUM = 64, 0.05, 0.9
STEPS = 120
JUDGED, JUDGE_EVERY = 256, 15  # test images, steps
FROZEN_FROM, NAN_AT = 20, 60  # steps
DIAGNOSED = 1024  # images that the doctor is given
MENDED_ON = 2048


_REMAINS = {
    "updates_in_eval": "The layer still updates in evaluation: the next test images change it again.",
    "batches_of_two": "The weights were learned from noisy statistics, and stay as they are.",
    "unshuffled": "The weights rely on what the images of a batch have in common: shuffle, and train anew.",
    "other_momentum": "Momentum is still 0.99: one more step, and the statistics are that batch's.",
    "dropout_before": "Dropout still stands before the batch norm: more training opens the gap again.",
    "never_updated": "The layer still forgets: train on, and its statistics grow old.",
    "one_frozen": "γ and β still learn while the statistics stand still: freeze both, or neither.",
}


class Breakage:
    """One training with some faults switched on.

    ``curve`` holds ``(step, accuracy in train(), accuracy in eval())`` on the same test images, put together
    into batches as the training does it.
    """

    def __init__(
        self, faults: frozenset[str], images: DeviceImages, test: DeviceImages, seed: int = 0
    ) -> None:
        self.faults, self._images, self._test, self._seed = faults, images, test, seed
        self.model = build(faults, seed)
        self.batch = 2 if "batches_of_two" in faults else BATCH
        rate = RATE / 5 if self.batch == 2 else RATE
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=rate, momentum=MOMENTUM)
        self._order = order_of(faults, images.labels, self.batch, seed)
        self.steps = 0
        self.loss = float("nan")
        self.curve: list[tuple[int, float, float]] = []
        self.mended: tuple[float, float] | None = None
        self.judge()

    @property
    def finished(self) -> bool:
        """Whether all steps are taken."""
        return self.steps >= STEPS

    def step(self) -> None:
        """Take one step."""
        x, labels = self._images.batch(self._order(self.steps))
        self._set_training()
        if "nan_batch" in self.faults and self.steps == NAN_AT:
            with torch.no_grad():  # the step itself is skipped, as a gradient scaler does
                self.model(torch.full_like(x, float("nan")))
        else:
            loss = F.cross_entropy(self.model(x), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.loss = float(loss.detach())
        self.steps += 1
        if self.steps % JUDGE_EVERY == 0 or self.finished:
            self.judge()

    def judge(self) -> None:
        """Add a point to the curve."""
        self.curve.append((self.steps, self.accuracy(training=True), self.accuracy(training=False)))

    def _set_training(self) -> None:
        self.model.train()
        if "one_frozen" in self.faults and self.steps >= FROZEN_FROM:
            self.model.get_submodule("bn2").eval()

    def accuracy(self, *, training: bool) -> float:
        """Share of the test images that are named right, in one of the modes.

        In train() statistics are those of batches as the training makes them, and dropout drops; what such a
        pass changes is put back. In eval() a layer that updates itself does so, as it would in life.
        """
        if training:
            with preserved(self.model), _quiet(), torch.no_grad():
                self._set_training()
                return self._share()
        self.model.eval()
        with torch.no_grad():
            return self._share()

    def _share(self) -> float:
        labels = self._test.labels[:JUDGED]
        order = labels.argsort(stable=True) if "unshuffled" in self.faults else torch.arange(len(labels))
        hits = 0
        for part in order.split(self.batch):
            x, truth = self._test.batch(part)
            hits += int((self.model(x).argmax(1) == truth).sum())
        return hits / len(labels)

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Batches as the training takes them: what the doctor is given."""
        return [self._images.batch(self._order(step)) for step in range(max(8, DIAGNOSED // self.batch))]

    def diagnose(self) -> Report:
        """The doctor's report on this model as it stands in its training."""
        self._set_training()
        return diagnose(self.model, self.batches(), loss=_loss, optimizer=self.optimizer)

    def mend(self) -> dict[str, Any]:
        """Recalibrate on mixed training images; return the accuracies in eval() before and after."""
        before = self.accuracy(training=False)
        generator = torch.Generator().manual_seed(self._seed)
        order = torch.randperm(len(self._images), generator=generator)[:MENDED_ON]
        trouble = None
        self.model.eval()
        try:
            with _quiet():
                recalibrate(self.model, [self._images.batch(part)[0] for part in order.split(256)])
        except GammabetaError as error:
            trouble = str(error)
        self.mended = (before, self.accuracy(training=False))
        return {"before": before, "after": self.mended[1], "trouble": trouble, "remains": self.remains()}

    def remains(self) -> list[str]:
        """What recalibration cannot bring back, in words."""
        return [text for key, text in _REMAINS.items() if key in self.faults]

    def frame(self) -> dict[str, Any]:
        """What the page draws."""
        return {
            "step": self.steps,
            "steps": STEPS,
            "loss": self.loss,
            "curve": self.curve,
            "finished": self.finished,
        }


def findings(report: Report) -> list[dict[str, Any]]:
    """The report's groups for the page; those that are alike speak once."""
    return [
        {
            "check": group.first.check,
            "severity": group.first.severity,
            "layers": group.names(4),
            **group.texts,
        }
        for group in report.groups
    ]


def _loss(output: Tensor, target: Tensor) -> float:
    return float(F.cross_entropy(output, target))


def _quiet() -> Any:
    return warnings.catch_warnings(action="ignore")


__all__ = ["STEPS", "Breakage", "findings"]
