"""``gammabeta train``: a recipe, a data set, a run folder."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .output import Device, Json, Quiet, console, print_json, share, size_of


def _complete_recipe() -> list[str]:
    from ..train.recipe import recipe_names

    return ["auto", *recipe_names()]


def train(
    data: Annotated[
        str | None, typer.Argument(help="A data set's name or path; default: mnist.", show_default=False)
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help="auto (the default: by the data), fast, pictures, classic, best or a TOML file.",
            autocompletion=_complete_recipe,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The run folder; default: a new one in runs/.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on with an interrupted run; with --epochs N, train also a finished one for N in all."
        ),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(help="Begin with the weights of this run (with --model: a file), not random ones."),
    ] = None,
    moved: Annotated[
        str | None, typer.Option("--data", help="With --resume: where the run's data are now.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Another network: timm:NAME, or module:function, which makes one."),
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
        int | None,
        typer.Option(min=0, max=(1 << 63) - 1, help="Of initialisation, order and augmentation; default: 0."),
    ] = None,
    holdout: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Hold out N training images, drawn from each class by the seed; judge on them, not the test "
            "images.",
        ),
    ] = None,
    image_size: Annotated[
        str | None,
        typer.Option(metavar="HxW", help="Resize a folder's pictures; default: by theirs."),
    ] = None,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Pass over pictures that cannot be read, and list them.")
    ] = False,
    checkpoint_every: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Between checkpoints.")
    ] = 30,
    track: Annotated[
        str, typer.Option(metavar="NAMES", help="Hand the numbers on to tensorboard, wandb, trackio.")
    ] = "",
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="The same as --track tensorboard.")
    ] = False,
    watch: Annotated[
        bool,
        typer.Option("--watch/--no-watch", help="Watch the batch norms, and say once what goes wrong."),
    ] = True,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Train a network on images and leave a run folder behind."""
    began = time.perf_counter()
    named = {
        "epochs": epochs if resume is None else None,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "precision": precision,
        "batch_norm": batch_norm,
    }
    overrides = [f"{field}={value}" for field, value in named.items() if value is not None] + (set_ or [])
    if resume is None and moved is not None:
        if data is not None:
            raise UsageError(f"two data sets are named, {data} and {moved}: choose one")
        data, moved = moved, None
    if resume is not None and (
        overrides
        or skip_damaged
        or any(value is not None for value in (data, recipe, out, seed, holdout, image_size, init))
    ):
        raise UsageError(
            "--resume takes every setting from the run: give it alone, or with --epochs for more of them, or "
            "with --data if its data have moved"
        )
    if device in ("auto", "cpu") and "WORLD_SIZE" not in os.environ:
        from ..kernels.cpu.workers import begin

        begin()  # on a core that has nothing to do while PyTorch is imported
    from .training import Request
    from .training import train as carry_out

    request = Request(
        resume=resume,
        epochs=epochs,
        init=init,
        recipe=recipe or "auto",
        model=model,
        overrides=overrides,
        source=data or "mnist",
        size=size_of(image_size),
        out=out,
        seed=seed or 0,
        holdout=holdout or 0,
        device=device,
        checkpoint_every=checkpoint_every,
        track=(*filter(None, map(str.strip, track.split(","))), *["tensorboard"] * tensorboard),
        skip_damaged=skip_damaged,
        moved=moved,
        watch=watch,
    )
    screen = console(json)
    result = carry_out(request, screen, quiet=quiet)
    if result is None:
        return
    result["total_seconds"] = round(time.perf_counter() - began, 4)
    if json:
        print_json(result)
    elif quiet:
        screen.print(f"{share(result['test_accuracy'])} {result['run']}")
    else:
        seconds = result["seconds"]
        epochs = round(result.get("passes", result["epochs"]), 2)
        screen.print(
            f"Trained for {epochs:g} epochs ({result['images']:,} images) "
            f"in {seconds['train']:.2f} s ({result['images_per_second']:,} images/s, {result['precision']}); "
            f"recalibrated in {seconds['recalibrate']:.2f} s; evaluated in {seconds['evaluate']:.2f} s; "
            f"{result['total_seconds']:.2f} s in all"
        )
        screen.print(f"The run is in {result['run']}", markup=False)
