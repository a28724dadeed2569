"""``gammabeta predict``: what is in these pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ..errors import UsageError
from .model import Best
from .output import Device, Json, console, print_json

if TYPE_CHECKING:
    from ..data.picture import Style


def predict(
    run: Annotated[Path, typer.Argument(help="A run folder, or an ONNX file that `export` wrote.")],
    images: Annotated[
        list[Path], typer.Argument(help="Pictures of any common format and size, ink dark or light.")
    ],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show for each picture.")] = 1,
    style: Annotated[
        str | None,
        typer.Option(
            help="How a picture is prepared: digit, object or plain; default: as the run's data need."
        ),
    ] = None,
    best: Best = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Name the class of each picture, and how probable it is; an ONNX file needs no torch."""
    wanted = _style(style)
    if run.suffix == ".onnx":
        classes, probabilities = _from_onnx(run, images, wanted)
    else:
        classes, probabilities = _from_run(run, images, wanted, device, best)
    guesses = [_likeliest(row, classes, top) for row in probabilities]
    if json:
        print_json(
            {"run": str(run), "predictions": [_row(*pair) for pair in zip(images, guesses, strict=True)]}
        )
        return
    for path, guess in zip(images, guesses, strict=True):
        shown = ", ".join(f"{name} {probability:.1%}" for name, probability in guess)
        console().print(f"{path}: {shown}", markup=False)


def _from_run(
    run: Path, images: list[Path], style: "Style | None", device: str, best: bool
) -> tuple[Sequence[str], list[list[float]]]:
    import numpy as np

    from ..data import load_picture, picture_style
    from ..train.load import load_model

    trained = load_model(run, device, best=best)
    info = trained.run.info.network
    style = style or picture_style(trained.run.info.data, info.channels)
    size = (info.height, info.width)
    pictures = [load_picture(path, channels=info.channels, size=size, style=style) for path in images]
    return info.classes, trained.probabilities(np.stack(pictures)).tolist()


def _from_onnx(
    file: Path, images: list[Path], style: "Style | None"
) -> tuple[Sequence[str], list[list[float]]]:
    import numpy as np

    from ..data import load_picture
    from ..data.onnxfile import OnnxClassifier

    model = OnnxClassifier.open(file)
    pictures = [
        load_picture(path, channels=model.channels, size=model.size, style=style or model.style)
        for path in images
    ]
    return model.classes, model.probabilities(np.stack(pictures)).tolist()


def _style(name: str | None) -> "Style | None":
    if name in (None, "digit", "object", "plain"):
        return cast("Style | None", name)
    raise UsageError(f"unknown style {name!r}: choose digit, object or plain")


def _likeliest(probabilities: list[float], classes: Sequence[str], top: int) -> list[tuple[str, float]]:
    order = sorted(range(len(classes)), key=lambda i: -probabilities[i])
    return [(classes[i], probabilities[i]) for i in order[:top]]


def _row(path: Path, guess: list[tuple[str, float]]) -> dict[str, object]:
    named = [{"class": name, "probability": probability} for name, probability in guess]
    return {"image": str(path), "predictions": named}
