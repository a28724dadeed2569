"""``gammabeta fold``: what of a network's batch norms folds away, and a folded network to serve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import Json, console, print_json
from .shipped import Best, Name, Shape, Weights, load_shipped

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
    best: Best = False,
    json: Json = False,
) -> None:
    """Fold batch norms into convolutions and linear layers; for a run, compare on every test image."""
    from ..export import save_program
    from ..folding import fold as fold_model

    shipped = load_shipped(model, weights, shape, best)
    folded = fold_model(shipped.model, shipped.example)
    report: FoldReport = folded.fold_report  # type: ignore[assignment]
    document: dict[str, Any] = {"model": model, "fold": report.to_dict(), "file": str(out) if out else None}
    if shipped.trained is not None:
        same, count = _compare(shipped.trained, folded)
        document |= {"images": count, "same_predictions": same}
    if out is not None:
        save_program(folded, out, shipped.example)
    if json:
        print_json(document)
        return
    screen = console()
    screen.print(report.table(), markup=False)
    if shipped.trained is not None:
        screen.print(f"{same:,} of {count:,} test images get the same prediction", markup=False)
    if out is not None:
        screen.print(f"{out}: load with torch.export.load(...).module()", markup=False)


def _compare(trained: Trained, folded: nn.Module) -> tuple[int, int]:
    """Count the test images on which both networks answer alike."""
    import torch

    from ..train.batches import DeviceImages
    from ..train.load import load_split

    images = load_split(trained, None, "test")
    held = DeviceImages(images, trained.scaling, trained.device)
    same = 0
    with torch.inference_mode():
        for start in range(0, len(held), 500):
            x, _ = held.batch(slice(start, start + 500))
            same += int((trained.model(x).argmax(1) == folded(x).argmax(1)).sum())
    return same, len(held)
