"""What ``gammabeta train`` does once its options are read: alone, resumed, or one of several processes."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import IO, Any, cast

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ..data import Dataset
from ..guard import Noticed
from ..text import for_shell
from ..train.choice import AUTO, choose
from ..train.evaluate import Evaluation
from ..train.fitting import Observer, TrainingInterrupted
from ..train.given import made_by
from ..train.loop import Progress as Standing
from ..train.recipe import load_recipe
from ..train.resume import Resumption
from ..train.run import Job, Run, default_path
from ..train.session import begun_before, follow, result_of, resume_run, train_run
from ..train.world import ALONE, AnotherFailed, World, joined, resolve_device
from .model import lacking, tell
from .output import share, to_nowhere

_WIDE, _NARROW = 70, 46  # columns of the progress beside its bar


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    resume: Path | None
    epochs: float | None  # of a run that is resumed; of a new one they are among the overrides
    init: Path | None
    recipe: str
    model: str | None
    overrides: list[str]
    source: str
    size: tuple[int, int] | None
    out: Path | None
    seed: int
    holdout: int
    device: str
    checkpoint_every: float
    track: tuple[str, ...]
    skip_damaged: bool = False
    moved: str | None = None  # where the data of the run to resume are now
    watch: bool = True


def train(request: Request, screen: Console, *, quiet: bool) -> dict[str, Any] | None:
    """Train or continue as requested; return the result as plain values, None if another process does."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return _train(request, screen, quiet, ALONE)
    try:
        with joined(request.device) as world:
            if world.writes:
                return _train(request, screen, quiet, world)
            with stop_on_signals() as stop:
                try:
                    follow(world, stop.requested)
                except (TrainingInterrupted, KeyboardInterrupt):
                    raise typer.Exit(stop.exit_code) from None
    except AnotherFailed as failure:
        raise typer.Exit(failure.exit_code) from None
    return None


def _train(request: Request, screen: Console, quiet: bool, world: World) -> dict[str, Any]:
    begun, reporter = request.resume, Reporter(screen, quiet)
    reporter.guards = request.watch
    loaded: tuple[Dataset, float] | None = None
    if begun is None:
        job = _asked(request)
        resolve_device(world.device(request.device))
        if request.recipe == AUTO:
            loaded = reporter.load(job)
            weights = job.init if job.model is None else None  # else of a file, which says nothing
            begin_with = None if weights is None else Run.open(weights).info.network
            recipe, told = choose(loaded[0], request.overrides, begin_with, job.model)
            job = replace(job, recipe=recipe)
            reporter.tell(told)
        begun = begun_before(request.out, job)
        done = None if begun is None else Run.open(begun).info.result
        if done is not None:
            world.broadcast(None)  # it was finished when torchrun restarted it: the others have nothing to do
            return {**done, "run": str(begun)}
    resumed = None
    if begun is not None:  # checked whole before the data are loaded
        made = Run.open(begun).info.network.model
        given = made_by(made) if made is not None and made == request.model else None
        resumed = Resumption.of(begun, None if request.resume is None else request.epochs, given)
        job = resumed.run.job
        job = job if request.moved is None else replace(job, source=request.moved, place=None)
    dataset, seconds = loaded or reporter.load(job)
    path = begun or request.out or default_path(job.recipe.name, job.source)
    options: dict[str, Any] = {"checkpoint_every": request.checkpoint_every, "world": world}
    with reporter.training(path):
        if resumed is None:
            _, outcome = train_run(dataset, job, path, reporter, track=request.track, **options)
        else:
            options |= {"tell": reporter.tell, "moved": request.moved}
            _, outcome = resume_run(resumed, dataset, reporter, **options)
    result = {**result_of(outcome), "run": str(path)}
    result["seconds"]["load"] = round(seconds, 4)
    return result


def _asked(request: Request) -> Job:
    """The job of a request; what is wrong with it is said before the data are loaded."""
    recipe = load_recipe("fast" if request.recipe == AUTO else request.recipe, request.overrides)
    job = Job(request.source, recipe, request.seed, request.holdout, request.size, request.device)
    init = None if request.init is None else str(request.init)
    if init is not None and request.model is None:
        Run.open(init)
    return replace(job, skip_damaged=request.skip_damaged, init=init, model=request.model)


class StopSignal:
    """A handler that remembers the signal that asked to stop; a second one stops at once."""

    def __init__(self) -> None:
        self._number: int | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        """Take a signal."""
        if self._number is not None:
            raise KeyboardInterrupt
        self._number = number

    def requested(self) -> bool:
        """Return whether a signal asked to stop."""
        return self._number is not None

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells report it."""
        return 128 + (self._number or signal.SIGINT)


@contextmanager
def stop_on_signals() -> Iterator[StopSignal]:
    """Take Ctrl-C (SIGINT), SIGTERM and a closed terminal (SIGHUP) as a request to stop after this step.

    A signal that was ignored before, as ``nohup`` ignores SIGHUP, is ignored still.
    """
    stop = StopSignal()
    with ExitStack() as stack:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                stack.callback(signal.signal, number, signal.signal(number, stop))
        yield stop


class LastingFile:
    """A stream that swallows what nobody can read any more: a closed pipe or terminal ends the output only.

    ``train | head`` closes the pipe after ten lines; the training is not to be lost for it.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, or nothing if the stream is closed."""
        with self._closing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, if it is not closed."""
        with self._closing():
            self._stream.flush()

    @contextmanager
    def _closing(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            to_nowhere(self._stream)


class Reporter(Observer):
    """Shows on the terminal how a training goes: a bar with loss, accuracy, images per second, time left."""

    def __init__(self, screen: Console, quiet: bool) -> None:
        screen.file = cast("IO[str]", LastingFile(screen.file))
        self._screen, self._quiet = screen, quiet
        self._lines = 0  # printed on the progress, where there is no bar
        self._stop = StopSignal()
        self._validated = False  # whether epochs are judged on validation images
        self._loss = float("nan")
        self._images, self._train = 0, ""  # training images; the accuracy on them, or some of them, in words
        self._roomy = screen.width >= 80
        self._epochs = 0.0
        self._bar = Progress(
            "{task.description}",
            BarColumn(max(4, min(40, screen.width - (_WIDE if self._roomy else _NARROW)))),
            "{task.percentage:3.0f}%",
            "{task.fields[figures]}",
            TimeRemainingColumn(compact=True),
            console=screen,
            disable=quiet or not screen.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("training", total=None, figures="")

    def load(self, job: Job) -> tuple[Dataset, float]:
        """Load a data set, with a bar if it must be downloaded; return it and the seconds it took."""
        clock = time.perf_counter()
        name = TextColumn("{task.description}", markup=False)
        columns = (name, BarColumn(), TimeRemainingColumn(), DownloadColumn(), TransferSpeedColumn())
        unseen = self._quiet or not self._screen.is_terminal
        with Progress(*columns, console=self._screen, transient=True, disable=unseen) as bar:
            tasks: dict[str, Any] = {}

            def fetched(name: str, done: int, total: int) -> None:
                if name not in tasks:
                    tasks[name] = bar.add_task(name)
                bar.update(tasks[name], completed=done, total=total)

            dataset = job.load(fetched)
        self._images = len(dataset.train)
        loaded = time.perf_counter() - clock
        chosen_by = "" if dataset.validation is None else f", {len(dataset.validation):,} validation"
        count = f"{len(dataset.train):,} training{chosen_by} and {len(dataset.test):,} test images"
        self._print(f"{dataset.name}: {count}, loaded in {loaded:.2f} s")
        for remark in dataset.remarks():
            self.tell(remark)
        tell([*dataset.notes, *chain(*(lacking(dataset, part) for part in dataset.splits()))])
        return dataset, loaded

    @contextmanager
    def training(self, path: Path) -> Iterator[None]:
        """Show the bar; a signal ends the command with the signal's exit code, after this step."""
        with stop_on_signals() as self._stop, self._bar:
            try:
                yield
            except (TrainingInterrupted, KeyboardInterrupt):
                self._bar.stop()
                again = f"gammabeta train --resume {for_shell(path.absolute())}"
                self._screen.print(f"Interrupted. Go on with: {again}")
                raise typer.Exit(self._stop.exit_code) from None

    def tell(self, message: str) -> None:
        """Print a message as a sentence, unless quiet."""
        self._print(message[0].upper() + message[1:])

    def _print(self, line: str) -> None:
        if not self._quiet:
            self._screen.print(line, markup=False)

    def compiling(self, done: int, kernels: int) -> None:
        """Show which kernel is being compiled; where there is no bar, how many there are."""
        if not done:
            self._clock = time.perf_counter()
        if done < kernels:
            description = f"compiling kernel {done + 1} of {kernels}"
            self._bar.update(self._task, description=description, total=kernels, completed=done)
        else:
            self._bar.update(self._task, description="training", total=None, completed=0)
            seconds = time.perf_counter() - self._clock
            self._print(f"Compiled {kernels} kernel{'s' * (kernels > 1)} in {seconds:.1f} s")

    def progressed(self, progress: Standing, seconds: float) -> None:
        """Move the bar, or print a line now and then where there is none."""
        self._loss, self._epochs = progress.loss, progress.epochs
        if not self._screen.is_terminal and seconds >= line_due(self._lines):
            while seconds >= line_due(self._lines):
                self._lines += 1
            rate = progress.images / max(seconds, 1e-9)
            left = seconds / progress.step * (progress.steps - progress.step)
            self._print(
                f"Epoch {progress.epoch}, step {progress.step:,} of {progress.steps:,}: "
                f"loss {progress.loss:.4f}, accuracy {progress.accuracy:.4f}, {rate:,.0f} images/s, "
                f"{left:,.0f} s left"
            )
        rate = progress.images / max(seconds, 1e-9)
        if self._roomy:
            description = f"epoch {progress.epoch}"
            figures = f"loss {progress.loss:.4f}  accuracy {progress.accuracy:.4f}  {rate:,.0f} images/s"
        else:
            description, figures = "", f"loss {progress.loss:.3f} acc {progress.accuracy:.3f} {rate:,.0f}/s"
        done: dict[str, Any] = {"total": progress.steps, "completed": progress.step, "figures": figures}
        self._bar.update(self._task, description=description, **done)

    def evaluated(self, epoch: int, split: str, result: Evaluation, seconds: float) -> None:
        """Print the notebook's line once both splits are evaluated."""
        if split == "train":
            some = f" of {result.count:,} images" if result.count < self._images else ""
            self._train = f"{result.accuracy:.5f}{some}"
        elif split == "test" and self._validated:
            self._print(f"Test images, looked at once: accuracy {share(result.accuracy)}")
        else:
            self._validated = split == "validation"
            whole = self._epochs == round(self._epochs)
            # The notebook's words, where they are true.
            place = f"Epoch {epoch}" if whole else f"After {round(self._epochs, 2):g} epochs"
            self._print(
                f"{place}. Loss: {self._loss:.4f}, Train_acc {self._train},"
                f" {split.capitalize()}_acc {share(result.accuracy)}"
            )

    def noticed(self, noticed: Noticed) -> None:
        """Print what the guard found."""
        self._print(f"Batch normalization, {noticed}")

    def stop_requested(self) -> bool:
        """Return whether a signal asked to stop."""
        return self._stop.requested()


def line_due(printed: int) -> float:
    """Return after how many seconds the next line on the progress is due: 5, 10, 20, 40, then each minute."""
    return 5.0 * 2**printed if printed < 4 else 60.0 * (printed - 3)
