"""``gammabeta predict``: what is in these pictures."""

from pathlib import Path
from typing import Annotated

import typer

from .output import Device, Json, console, print_json


def predict(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    images: Annotated[
        list[Path], typer.Argument(help="Pictures of any common format and size, ink dark or light.")
    ],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show for each picture.")] = 1,
    best: Annotated[bool, typer.Option("--best", help="The best epoch's weights, not the last's.")] = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Name the class of each picture, and how probable it is."""
    import numpy as np

    from ..data.picture import load_picture
    from ..train.load import load_model

    trained = load_model(run, device, best=best)
    info = trained.run.info.network
    pictures = [load_picture(path, channels=info.channels, size=(info.height, info.width)) for path in images]
    likely = trained.probabilities(np.stack(pictures)).topk(min(top, len(info.classes)))
    guesses = [
        [(info.classes[i], p) for i, p in zip(indices, probabilities, strict=True)]
        for indices, probabilities in zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
    ]
    if json:
        print_json(
            {"run": str(run), "predictions": [_row(*pair) for pair in zip(images, guesses, strict=True)]}
        )
        return
    for path, guess in zip(images, guesses, strict=True):
        shown = ", ".join(f"{name} {probability:.1%}" for name, probability in guess)
        console().print(f"{path}: {shown}", markup=False)


def _row(path: Path, guess: list[tuple[str, float]]) -> dict[str, object]:
    named = [{"class": name, "probability": probability} for name, probability in guess]
    return {"image": str(path), "predictions": named}
