"""The progress bar of a training: loss, accuracy, images a second, time left."""

from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .interrupt import StopWish

if TYPE_CHECKING:
    from ..train.evaluate import Evaluation
    from ..train.loop import Progress as Standing
    from ..train.watch import LayerStatistics


class TrainingBar:
    """An observer that draws; it is a context manager."""

    def __init__(self, console: Console, wish: StopWish, *, quiet: bool) -> None:
        self._console, self._wish, self._quiet = console, wish, quiet
        self._moving_loss = float("nan")
        self._train_accuracy = float("nan")
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TextColumn("loss {task.fields[loss]:.4f}  accuracy {task.fields[accuracy]:.4f}"),
            TextColumn("{task.fields[speed]:,.0f} images/s"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=quiet,
            transient=True,
        )
        self._task = self._bar.add_task(
            "training", total=None, loss=float("nan"), accuracy=float("nan"), speed=0.0
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, word: str) -> None:
        """Print a line above the bar."""
        if not self._quiet:
            self._console.print(word[0].upper() + word[1:], markup=False)

    def stop(self) -> None:
        """Take the bar off the screen."""
        self._bar.stop()

    def progressed(self, progress: "Standing", seconds: float) -> None:
        """Move the bar."""
        self._moving_loss = progress.loss
        self._bar.update(
            self._task,
            description=f"epoch {progress.epoch}",
            total=progress.steps,
            completed=progress.step,
            loss=progress.loss,
            accuracy=progress.accuracy,
            speed=progress.images / max(seconds, 1e-9),
        )

    def evaluated(self, epoch: int, split: str, result: "Evaluation", seconds: float) -> None:
        """Print the notebook's line once both splits are judged."""
        if split == "train":
            self._train_accuracy = result.accuracy
            return
        if not self._quiet:
            self._console.print(
                f"Epoch {epoch}. Loss: {self._moving_loss:.4f}, Train_acc {self._train_accuracy:.5f},"
                f" Test_acc {result.accuracy:.5g}"
            )

    def watched(self, progress: "Standing", statistics: "dict[str, LayerStatistics]") -> None:
        """Say nothing: this is for the curves."""

    def stop_requested(self) -> bool:
        """Tell whether a signal asked to stop."""
        return self._wish.signal is not None
