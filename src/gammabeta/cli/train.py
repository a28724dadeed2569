"""``gammabeta train``: a recipe, a data set, a run folder."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from .interrupt import stop_on_signals
from .output import Device, Json, Quiet, console, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from ..data import Dataset
    from ..train.fitting import Outcome
    from ..train.run import Run
    from ..train.world import World
    from .progress import TrainingBar


def _complete_recipe() -> list[str]:
    from ..train.recipe import recipe_names

    return recipe_names()


def train(
    data: Annotated[
        str | None, typer.Argument(help="A data set's name or path; default: mnist.", show_default=False)
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help="fast (the default), classic, best or a TOML file.",
            autocompletion=_complete_recipe,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The run folder; default: a new one in runs/.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with an interrupted run; all settings are the run's own.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training images.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32 or bf16.")] = None,
    batch_norm: Annotated[
        bool | None, typer.Option("--batch-norm/--no-batch-norm", help="Train with it, or the twin without.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="FIELD=VALUE", help="Any field of the recipe.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of initialisation, order and augmentation; default: 0.")
    ] = None,
    holdout: Annotated[
        int | None,
        typer.Option(
            min=0, help="Hold out the last N training images and judge on them, not the test images."
        ),
    ] = None,
    checkpoint_every: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Between checkpoints within an epoch.")
    ] = 30,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard events too.")] = False,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Train the digit network (or its like, for other images) and leave a run folder behind."""
    began = time.perf_counter()
    named = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "precision": precision,
        "batch_norm": batch_norm,
    }
    overrides = [f"{field}={value}" for field, value in named.items() if value is not None] + (set_ or [])
    screen = console(json)
    if resume is not None:
        if overrides or any(value is not None for value in (data, recipe, out, seed, holdout)):
            raise UsageError("--resume takes every setting from the run: give it alone")
        work = partial(_resume, resume, checkpoint_every)
    else:
        where = (data or "mnist", out, seed or 0, holdout or 0, device, tensorboard)
        work = partial(_start, recipe or "fast", overrides, *where, checkpoint_every)
    with _joined(device) as world:
        if world is not None and not world.writes:
            _follow(world)
            return
        result = work(screen, quiet, world) | {"total_seconds": round(time.perf_counter() - began, 4)}
    if json:
        print_json(result)
    elif quiet:
        screen.print(f"{result['test_accuracy']:.4f} {result['run']}")
    else:
        _summarise(screen, result)


@contextmanager
def _joined(device: str) -> Iterator["World | None"]:
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


def _follow(world: "World") -> None:
    from ..train.fitting import TrainingInterrupted
    from ..train.session import follow

    with stop_on_signals() as wish:
        try:
            follow(world, lambda: wish.signal is not None)
        except (TrainingInterrupted, KeyboardInterrupt):
            raise typer.Exit(wish.exit_code) from None


def _start(
    recipe_name: str,
    overrides: list[str],
    source: str,
    out: Path | None,
    seed: int,
    holdout: int,
    device: str,
    tensorboard: bool,
    every: float,
    screen: "Console",
    quiet: bool,
    world: "World | None",
) -> dict[str, Any]:
    from ..train.recipe import load_recipe

    recipe = load_recipe(recipe_name, overrides)
    from ..train.device import resolve_device
    from ..train.elastic import begun_before
    from ..train.run import Run, default_path
    from ..train.session import train_run
    from ..train.world import ALONE

    world = world or ALONE
    resolve_device(world.device(device))
    before = begun_before(out, recipe, source, seed, holdout)
    if before is not None:
        result = Run.open(before).info.result
        if result is None:
            return _resume(before, every, screen, quiet, world)
        world.share(None)  # it was finished when torchrun restarted it: the others have nothing to do
        return {**result, "run": str(before)}
    dataset, loaded = _load(source, holdout, screen, quiet)
    path = out or default_path(recipe.name, source)
    options: dict[str, Any] = {"seed": seed, "device": device, "holdout": holdout, "world": world}
    options |= {"checkpoint_every": every, "tensorboard": tensorboard}
    with _watched(path, screen, quiet) as bar:
        run, outcome = train_run(dataset, source, recipe, path, observer=bar, **options)
    return _result(run, outcome, loaded)


def _resume(
    path: Path, every: float, screen: "Console", quiet: bool, world: "World | None"
) -> dict[str, Any]:
    from ..train.run import Run
    from ..train.session import resume_run
    from ..train.world import ALONE

    info = Run.open(path).info
    dataset, loaded = _load(info.data, info.holdout, screen, quiet)
    with _watched(path, screen, quiet) as bar:
        run, outcome = resume_run(
            path, dataset, bar, tell=bar.say, checkpoint_every=every, world=world or ALONE
        )
    return _result(run, outcome, loaded)


def _load(source: str, holdout: int, screen: "Console", quiet: bool) -> tuple["Dataset", float]:
    from .. import data as datasets
    from ..train.fitting import hold_out

    clock = time.perf_counter()
    dataset = datasets.load(source)
    if holdout:
        dataset = hold_out(dataset, holdout)
    loaded = time.perf_counter() - clock
    if not quiet:
        count = f"{len(dataset.train.labels):,} training and {len(dataset.test.labels):,} test images"
        screen.print(f"{dataset.name}: {count}, loaded in {loaded:.2f} s")
    return dataset, loaded


@contextmanager
def _watched(path: Path, screen: "Console", quiet: bool) -> Iterator["TrainingBar"]:
    """Show a bar and turn signals into a wish to stop, which ends the command with the signal's exit code."""
    from ..train.fitting import TrainingInterrupted
    from .progress import TrainingBar

    with stop_on_signals() as wish, TrainingBar(screen, wish, quiet=quiet) as bar:
        try:
            yield bar
        except (TrainingInterrupted, KeyboardInterrupt):
            bar.stop()
            screen.print(f"Interrupted. Go on with: gammabeta train --resume {path}", markup=False)
            raise typer.Exit(wish.exit_code) from None


def _result(run: "Run", outcome: "Outcome", loaded: float) -> dict[str, Any]:
    from ..train.session import result_of

    result = {**result_of(outcome), "run": str(run.path)}
    result["seconds"]["load"] = round(loaded, 4)
    return result


def _summarise(screen: "Console", result: dict[str, Any]) -> None:
    seconds = result["seconds"]
    screen.print(
        f"Trained on {result['images']:,} images in {seconds['train']:.2f} s "
        f"({result['images_per_second']:,} images/s, {result['precision']}); "
        f"recalibrated in {seconds['recalibrate']:.2f} s; evaluated in {seconds['evaluate']:.2f} s; "
        f"{result['total_seconds']:.2f} s in all"
    )
    screen.print(f"The run is in {result['run']}", markup=False)
