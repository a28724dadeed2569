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
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Name the class of each picture, and how probable it is."""
    import numpy as np

    from ..data.picture import load_picture
    from ..train.load import load_model

    trained = load_model(run, device)
    info = trained.run.info.network
    pictures = [load_picture(path, channels=info.channels, size=(info.height, info.width)) for path in images]
    best = trained.probabilities(np.stack(pictures)).topk(min(top, len(info.classes)))
    rows = [
        {
            "image": str(path),
            "predictions": [
                {"class": info.classes[int(i)], "probability": float(p)}
                for p, i in zip(ps, indices, strict=True)
            ],
        }
        for path, ps, indices in zip(images, best.values, best.indices, strict=True)
    ]
    if json:
        print_json({"run": str(run), "predictions": rows})
        return
    for path, row in zip(images, rows, strict=True):
        shown = ", ".join(f"{guess['class']} {guess['probability']:.1%}" for guess in row["predictions"])
        console().print(f"{path}: {shown}", markup=False)
