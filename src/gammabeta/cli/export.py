"""``gammabeta export``: a trained network as one ONNX file."""

from pathlib import Path
from typing import Annotated

import typer

from .output import Json, console, print_json


def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file; default: RUN/model.onnx.")
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="The best epoch's weights, not the last's.")] = False,
    json: Json = False,
) -> None:
    """Fold the network, write it as ONNX, and check that ONNX Runtime computes the same."""
    import torch

    from ..data import picture_style
    from ..surgery.export import Preprocessing, export_onnx
    from ..train.load import load_model

    trained = load_model(run, "cpu", best=best)
    network = trained.run.info.network
    preprocessing = Preprocessing(
        network.channels,
        network.height,
        network.width,
        tuple(network.pixel_mean),
        tuple(network.pixel_scale),
        picture_style(trained.run.info.data, network.channels),
    )
    example = torch.randn(2, network.channels, network.height, network.width)
    report = export_onnx(
        trained.model,
        out or run / "model.onnx",
        example,
        classes=network.classes,
        preprocessing=preprocessing,
    )
    if json:
        print_json({"run": str(run), **report.to_dict()})
        return
    screen = console()
    screen.print(report.fold.table(), markup=False)
    sizes = ", ".join(map(str, report.batches))
    screen.print(
        f"{report.path}: {report.size / 1e6:.2f} MB, opset {report.opset}; ONNX Runtime's output differs "
        f"from the model's by {report.error:.1e} relative (batches of {sizes})",
        markup=False,
    )
