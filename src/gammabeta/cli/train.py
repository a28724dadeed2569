"""``gammabeta train``: a recipe, a data set, a run folder."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .interrupt import stop_on_signals
from .output import Device, Json, Quiet, console, print_json

if TYPE_CHECKING:
    from rich.console import Console


def _complete_recipe() -> list[str]:
    from ..train.recipe import recipe_names

    return recipe_names()


def train(
    data: Annotated[str, typer.Argument(help="A data set's name or path; see docs/data.md.")] = "mnist",
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe", "-r", help="fast, classic, best or a TOML file.", autocompletion=_complete_recipe
        ),
    ] = "fast",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The run folder; default: a new one in runs/.")
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
    seed: Annotated[int, typer.Option(min=0, help="Of initialisation, order and augmentation.")] = 0,
    holdout: Annotated[
        int,
        typer.Option(
            min=0, help="Judge on the last N training images, not trained on, instead of the test images."
        ),
    ] = 0,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Train the digit network (or its like, for other images) and leave a run folder behind."""
    began = time.perf_counter()
    from .. import data as datasets
    from ..train.device import resolve_device
    from ..train.fitting import TrainingInterrupted, hold_out
    from ..train.recipe import load_recipe
    from ..train.run import default_path
    from ..train.session import result_of, train_run
    from .progress import TrainingBar

    named = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "precision": precision,
        "batch_norm": batch_norm,
    }
    overrides = [f"{field}={value}" for field, value in named.items() if value is not None] + (set_ or [])
    settings = load_recipe(recipe, overrides)
    resolve_device(device)
    clock = time.perf_counter()
    dataset = datasets.load(data)
    if holdout:
        dataset = hold_out(dataset, holdout)
    loaded = time.perf_counter() - clock
    screen = console(json)
    if not quiet:
        count = f"{len(dataset.train.labels):,} training and {len(dataset.test.labels):,} test images"
        screen.print(f"{dataset.name}: {count}, loaded in {loaded:.2f} s")
    path = out or default_path(settings.name, data)
    with stop_on_signals() as wish, TrainingBar(screen, wish, quiet=quiet) as bar:
        try:
            run, outcome = train_run(
                dataset, data, settings, path, seed=seed, device=device, holdout=holdout, observer=bar
            )
        except (TrainingInterrupted, KeyboardInterrupt):
            bar.stop()
            screen.print(f"Interrupted; what was learnt so far is in {path}")
            raise typer.Exit(wish.exit_code) from None
    result = {**result_of(outcome), "run": str(run.path)}
    result["seconds"] |= {"load": round(loaded, 4), "total": round(time.perf_counter() - began, 4)}
    if json:
        print_json(result)
    elif quiet:
        screen.print(f"{outcome.test.accuracy:.4f} {run.path}")
    else:
        _summarise(screen, result)


def _summarise(screen: "Console", result: dict[str, Any]) -> None:
    seconds = result["seconds"]
    screen.print(
        f"Trained on {result['images']:,} images in {seconds['train']:.2f} s "
        f"({result['images_per_second']:,} images/s, {result['precision']}); "
        f"recalibrated in {seconds['recalibrate']:.2f} s; evaluated in {seconds['evaluate']:.2f} s"
    )
    screen.print(f"The run is in {result['run']}")
