"""``gammabeta export``: a network as one ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .output import Json, console, print_json
from .shipped import Best, Name, Shape, Weights, load_shipped

if TYPE_CHECKING:
    from ..export import Preprocessing
    from ..train.load import Trained


def export(
    model: Name,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file; default: model.onnx, in the run folder.")
    ] = None,
    weights: Weights = None,
    shape: Shape = None,
    best: Best = False,
    json: Json = False,
) -> None:
    """Fold the network, write it as ONNX, and check that ONNX Runtime computes the same."""
    from ..export import export_onnx

    shipped = load_shipped(model, weights, shape, best)
    classes = shipped.trained.run.info.network.classes if shipped.trained else None
    folder = Path(model) if shipped.trained else Path()
    report = export_onnx(
        shipped.model,
        out or folder / "model.onnx",
        shipped.example,
        classes=classes,
        preprocessing=_preprocessing(shipped.trained) if shipped.trained else None,
    )
    if json:
        print_json({"model": model, **report.to_dict()})
        return
    screen = console()
    screen.print(report.fold.table(), markup=False)
    sizes = ", ".join(map(str, report.batches))
    screen.print(
        f"{report.path}: {report.size / 1e6:.2f} MB, opset {report.opset}; ONNX Runtime's output differs "
        f"from the model's by {report.error:.1e} relative (batches of {sizes})",
        markup=False,
    )


def _preprocessing(trained: Trained) -> Preprocessing:
    from ..data import picture_style
    from ..export import Preprocessing

    network = trained.run.info.network
    return Preprocessing(
        network.channels,
        network.height,
        network.width,
        tuple(network.pixel_mean),
        tuple(network.pixel_scale),
        picture_style(trained.run.info.data, network.channels),
    )
