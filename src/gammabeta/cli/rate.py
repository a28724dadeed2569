"""``gammabeta find-rate``: which learning rates a data set and a recipe can be trained with."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .model import tell
from .output import Device, Json, Quiet, console, print_json, size_of


def find_rate(
    data: Annotated[str, typer.Argument(help="A data set's name or path.")],
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="auto (by the data), a recipe's name or a TOML file.")
    ] = "auto",
    set_: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="FIELD=VALUE", help="Any field of the recipe.")
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Resize a folder's pictures; default: by theirs.")
    ] = None,
    steps: Annotated[int, typer.Option(min=20, help="Learning rates that are tried, one a step.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and the order of the images.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture.")] = Path("learning-rate.png"),
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Find the range of learning rates (Smith 2017): a short training whose rate grows, drawn as a curve."""
    from ..files import make_folder
    from ..train.choice import AUTO, choose
    from ..train.networks import build_network
    from ..train.plots import rate_range, save_figure
    from ..train.rate import find_rate as carry_out
    from ..train.recipe import load_recipe
    from ..train.run import Job

    settings = set_ or []
    chosen = load_recipe("fast" if recipe == AUTO else recipe, settings)
    dataset = Job(data, chosen, seed, size=size_of(image_size)).load()
    tell(dataset.notes)
    if recipe == AUTO:
        chosen, _ = choose(dataset, settings)
    network = build_network(chosen, dataset, seed)
    found = carry_out(network, dataset, chosen, device=device, seed=seed, steps=steps)
    make_folder(out.parent)
    save_figure(rate_range(found, f"{dataset.name}, recipe {chosen.name}, seed {seed}"), out)
    if json:
        print_json({"data": data, "recipe": chosen.name, **asdict(found), "picture": str(out)})
        return
    screen = console()
    screen.print(f"{found.suggested:.2g}")
    if not quiet:
        screen.print(
            f"The loss falls between the learning rates {found.low:.2g} and {found.high:.2g}. "
            f"A highest rate to try: --learning-rate {found.suggested:.2g} (recipe {chosen.name} has "
            f"{chosen.learning_rate:g})"
        )
        screen.print(f"Picture: {out}", markup=False)
