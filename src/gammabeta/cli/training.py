"""What ``gammabeta train`` does once its options are read: alone, resumed, or one of several processes."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .interrupt import stop_on_signals

if TYPE_CHECKING:
    from rich.console import Console

    from ..data import Dataset
    from ..train.fitting import Outcome
    from ..train.run import Run
    from ..train.world import World
    from .progress import TrainingBar


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    resume: Path | None
    recipe: str
    overrides: list[str]
    source: str
    size: tuple[int, int] | None
    out: Path | None
    seed: int
    holdout: int
    device: str
    checkpoint_every: float
    tensorboard: bool


@contextmanager
def joined(device: str) -> Iterator["World | None"]:
    """Meet the other processes if torchrun has started several; alone, no time is spent on it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield None
        return
    from ..train.world import AnotherFailed, joined

    try:
        with joined(device) as world:
            yield world
    except AnotherFailed as silent:
        raise typer.Exit(silent.exit_code) from None


def follow(world: "World") -> None:
    """Take part in a training that another process writes down."""
    from ..train.fitting import TrainingInterrupted
    from ..train.session import follow as follow_writer

    with stop_on_signals() as wish:
        try:
            follow_writer(world, lambda: wish.signal is not None)
        except (TrainingInterrupted, KeyboardInterrupt):
            raise typer.Exit(wish.exit_code) from None


def carry_out(request: Request, screen: "Console", quiet: bool, world: "World | None") -> dict[str, Any]:
    """Train or go on as requested; return the result as plain values."""
    from ..train.world import ALONE

    teller = _Teller(screen, quiet)
    if request.resume is not None:
        return _resume(request.resume, request, teller, world or ALONE)
    return _start(request, teller, world or ALONE)


def _start(request: Request, teller: "_Teller", world: "World") -> dict[str, Any]:
    from ..train.device import resolve_device
    from ..train.elastic import begun_before
    from ..train.recipe import load_recipe
    from ..train.run import Run, default_path
    from ..train.session import train_run

    recipe = load_recipe(request.recipe, request.overrides)
    resolve_device(world.device(request.device))
    before = begun_before(request.out, recipe, request.source, request.seed, request.holdout)
    if before is not None:
        result = Run.open(before).info.result
        if result is None:
            return _resume(before, request, teller, world)
        world.share(None)  # it was finished when torchrun restarted it: the others have nothing to do
        return {**result, "run": str(before)}
    dataset, loaded = teller.load(request.source, request.holdout, request.size)
    path = request.out or default_path(recipe.name, request.source)
    with teller.watching(path) as bar:
        run, outcome = train_run(
            dataset,
            request.source,
            recipe,
            path,
            seed=request.seed,
            device=request.device,
            holdout=request.holdout,
            observer=bar,
            checkpoint_every=request.checkpoint_every,
            tensorboard=request.tensorboard,
            world=world,
        )
    return _result(run, outcome, loaded)


def _resume(path: Path, request: Request, teller: "_Teller", world: "World") -> dict[str, Any]:
    from ..train.run import Run
    from ..train.session import resume_run

    info = Run.open(path).info
    size = (info.network.height, info.network.width)
    dataset, loaded = teller.load(info.data, info.holdout, size)
    every = request.checkpoint_every
    with teller.watching(path) as bar:
        run, outcome = resume_run(path, dataset, bar, tell=bar.say, checkpoint_every=every, world=world)
    return _result(run, outcome, loaded)


@dataclass(frozen=True)
class _Teller:
    """Shows a person how it goes."""

    screen: "Console"
    quiet: bool

    def load(self, source: str, holdout: int, size: tuple[int, int] | None) -> tuple["Dataset", float]:
        """Load a data set, with a bar if it has to be fetched; return it and the seconds it took."""
        from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

        from .. import data as datasets
        from ..train.fitting import hold_out

        clock = time.perf_counter()
        columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=self.screen, transient=True, disable=self.quiet) as bar:
            tasks: dict[str, Any] = {}

            def fetched(name: str, done: int, total: int) -> None:
                if name not in tasks:
                    tasks[name] = bar.add_task(name)
                bar.update(tasks[name], completed=done, total=total)

            dataset = datasets.load(source, size=size, progress=fetched)
        if holdout:
            dataset = hold_out(dataset, holdout)
        loaded = time.perf_counter() - clock
        if not self.quiet:
            count = f"{len(dataset.train.labels):,} training and {len(dataset.test.labels):,} test images"
            self.screen.print(f"{dataset.name}: {count}, loaded in {loaded:.2f} s")
        return dataset, loaded

    @contextmanager
    def watching(self, path: Path) -> Iterator["TrainingBar"]:
        """Show a bar and turn signals into a wish to stop, which ends the command with the signal's code."""
        from ..train.fitting import TrainingInterrupted
        from .progress import TrainingBar

        with stop_on_signals() as wish, TrainingBar(self.screen, wish, quiet=self.quiet) as bar:
            try:
                yield bar
            except (TrainingInterrupted, KeyboardInterrupt):
                bar.stop()
                self.screen.print(f"Interrupted. Go on with: gammabeta train --resume {path}", markup=False)
                raise typer.Exit(wish.exit_code) from None


def _result(run: "Run", outcome: "Outcome", loaded: float) -> dict[str, Any]:
    from ..train.session import result_of

    result = {**result_of(outcome), "run": str(run.path)}
    result["seconds"]["load"] = round(loaded, 4)
    return result
