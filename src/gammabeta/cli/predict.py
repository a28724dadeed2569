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
    if style not in (None, "digit", "object", "plain"):
        raise UsageError(f"unknown style {style!r}: choose digit, object or plain")
    wanted = cast("Style | None", style)
    if run.suffix.lower() == ".onnx":
        classes, probabilities = _from_onnx(run, images, wanted)
    else:
        classes, probabilities = _from_run(run, images, wanted, device, best)
    predictions = []
    for path, row in zip(images, probabilities, strict=True):
        likeliest = sorted(zip(classes, row, strict=True), key=lambda guess: -guess[1])[:top]
        if not json:
            shown = ", ".join(f"{name} {probability:.1%}" for name, probability in likeliest)
            console().print(f"{path}: {shown}", markup=False)
        named = [{"class": name, "probability": probability} for name, probability in likeliest]
        predictions.append({"image": str(path), "predictions": named})
    if json:
        print_json({"run": str(run), "predictions": predictions})


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
