"""``gammabeta fold`` and ``gammabeta export``: a network with its batch norms folded, for serving."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from ..errors import UsageError
from .model import Best, Name, Shape, Weights, check_folder, example_input, find_model, tell
from .output import Json, console, print_json

if TYPE_CHECKING:
    from torch import nn

    from ..folding import FoldReport
    from ..train.load import Trained


def fold(
    model: Name,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the folded network as a torch.export program (.pt2)."),
    ] = None,
    weights: Weights = None,
    shape: Shape = None,
    data: Annotated[
        str | None, typer.Option(help="For a run: where its data are now, or others to compare on.")
    ] = None,
    best: Best = False,
    json: Json = False,
) -> None:
    """Fold batch norms into convolutions and linear layers; for a run, compare on every test image."""
    from ..export import save_program
    from ..folding import fold as fold_model

    found = find_model(model, weights, "cpu", best=best)
    if out is not None:
        check_folder(out, "--out")
    if data is not None and found.trained is None:
        raise UsageError("--data is for a run folder: a model of your own is compared on random inputs")
    example = example_input(found, shape)
    folded = fold_model(found.module.eval(), example)
    report: FoldReport = folded.fold_report  # type: ignore[assignment]
    document: dict[str, Any] = {"model": model, "fold": report.to_dict(), "file": str(out) if out else None}
    if found.trained is not None:
        same, count = _compare(found.trained, folded, data)
        document |= {"images": count, "same_predictions": same}
    if out is not None:
        save_program(folded, out, example, **(_described(found.trained) if found.trained else {}))
    if json:
        print_json(document)
        return
    screen = console()
    screen.print(Text(report.table()))
    if found.trained is not None:
        screen.print(f"{same:,} of {count:,} test images get the same prediction", markup=False)
    if out is not None:
        screen.print(f"{out}: load with torch.export.load(...).module()", markup=False)


def _compare(trained: Trained, folded: nn.Module, data: str | None) -> tuple[int, int]:
    """Return on how many test images both networks give the same class, and how many there are."""
    import torch

    from ..train.batches import DeviceImages
    from ..train.evaluate import evaluation_batch
    from ..train.load import load_dataset

    dataset = load_dataset(trained, data)
    tell(dataset.notes)
    held = DeviceImages(dataset.test, trained.scaling, trained.device)
    same, batch = 0, evaluation_batch(*held.size)
    with torch.inference_mode():
        for start in range(0, len(held), batch):
            x, _ = held.batch(slice(start, start + batch))
            same += int((trained.model(x).argmax(1) == folded(x).argmax(1)).sum())
    return same, len(held)


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

    found = find_model(model, weights, "cpu", best=best)
    example = example_input(found, shape)
    described = _described(found.trained) if found.trained else {}
    file = out or (Path(model) if found.trained else Path()) / "model.onnx"
    check_folder(file, "--out")
    report = export_onnx(found.module.eval(), file, example, **described)
    if json:
        print_json({"model": model, **report.to_dict()})
        return
    screen = console()
    screen.print(Text(report.fold.table()))
    sizes = ", ".join(map(str, report.batches))
    screen.print(
        f"{report.path}: {report.size / 1e6:.2f} MB, opset {report.opset}; ONNX Runtime's output differs "
        f"from the model's by {report.error:.1e} relative (batches of {sizes})",
        markup=False,
    )


def _described(trained: Trained) -> dict[str, Any]:
    """Return what an ONNX file says of its classes and its input."""
    from ..export import Preprocessing

    network, scaling = trained.run.info.network, trained.scaling
    shape = (network.channels, network.height, network.width)
    preparation = trained.run.preparation
    way = (preparation.style, preparation, network.temperature)
    preprocessing = Preprocessing(*shape, scaling.mean, scaling.scale, *way)
    return {"classes": network.classes, "preprocessing": preprocessing}
