"""What a run folder is told while a training goes on: metrics, checkpoints, the best weights."""

import time
from dataclasses import asdict

from .checkpoint import Checkpoints, State
from .evaluate import Evaluation
from .fitting import Observer
from .loop import Progress, Training
from .run import Run
from .watch import LayerStatistics


class Recorder:
    """An observer that writes ``metrics.jsonl`` and passes everything on."""

    def __init__(self, run: Run, steps_per_epoch: int, then: Observer) -> None:
        self._run, self._steps_per_epoch, self._then = run, steps_per_epoch, then
        self._epochs, self._step = 0.0, 0

    def progressed(self, progress: Progress, seconds: float) -> None:
        """Write where the training stands."""
        self._epochs, self._step = progress.step / self._steps_per_epoch, progress.step
        self._run.record(
            "progress",
            step=progress.step,
            epochs=round(self._epochs, 4),
            images=progress.images,
            loss=progress.loss,
            accuracy=progress.accuracy,
            learning_rate=progress.learning_rate,
            seconds=round(seconds, 3),
        )
        self._then.progressed(progress, seconds)

    def evaluated(self, epoch: int, split: str, result: Evaluation, seconds: float) -> None:
        """Write how a split was judged."""
        self._run.record(
            "evaluation",
            step=self._step,
            epoch=epoch,
            epochs=round(self._epochs, 4),
            split=split,
            accuracy=result.accuracy,
            loss=result.loss,
            correct=result.correct,
            count=result.count,
            seconds=round(seconds, 3),
        )
        self._then.evaluated(epoch, split, result, seconds)

    def watched(self, progress: Progress, statistics: dict[str, LayerStatistics]) -> None:
        """Write each layer's statistics."""
        self._run.record(
            "statistics",
            step=progress.step,
            epochs=round(progress.step / self._steps_per_epoch, 4),
            layers={name: asdict(layer) for name, layer in statistics.items()},
        )
        self._then.watched(progress, statistics)

    def stop_requested(self) -> bool:
        """Ask whoever is told."""
        return self._then.stop_requested()


class RunKeeper:
    """Keeps checkpoints and the best weights in a run folder.

    Args:
        run: The folder, being written.
        every: Seconds between checkpoints within an epoch; one is kept after every epoch in any case.
        state: What to begin with; None: anew.
    """

    def __init__(self, run: Run, every: float, state: State | None = None) -> None:
        self._run, self._every, self._state = run, every, state
        self._checkpoints = Checkpoints(run.path)
        self._last = time.monotonic()
        self._best = (
            float("inf") if state is None or state.values["best_loss"] is None else state.values["best_loss"]
        )

    def begin(self, training: Training) -> float:
        """Restore the state, if there is one."""
        if self._state is None:
            return 0.0
        training.restore(self._state)
        return float(self._state.values["seconds"])

    def visit(self, training: Training, seconds: float, *, now: bool = False) -> None:
        """Write a checkpoint if it is time to."""
        if not now and time.monotonic() - self._last < self._every:
            return
        state = training.state()
        best = self._best if self._best < float("inf") else None
        more = {"seconds": seconds, "metrics_bytes": self._run.metrics_bytes, "best_loss": best}
        self._checkpoints.save(State(state.tensors, state.values | more))
        self._last = time.monotonic()

    def judged(self, training: Training, test: Evaluation) -> None:
        """Keep the weights if no epoch was judged better, and there are several to judge."""
        if test.loss < self._best and training.order.steps_per_epoch < training.steps:
            self._run.save_model(training.model, best=True)
        self._best = min(self._best, test.loss)
