"""``gammabeta fold``: what of a network's batch norms folds away, and a folded network to serve."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .output import Json, console, print_json

if TYPE_CHECKING:
    from torch import nn

    from ..data import Split
    from ..surgery.fold import FoldReport
    from ..train.load import Trained


def fold(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the folded network as a torch.export program (.pt2)."),
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="The best epoch's weights, not the last's.")] = False,
    json: Json = False,
) -> None:
    """Fold batch norms into convolutions and linear layers, and compare on every test image."""
    import torch

    from ..surgery.export import save_program
    from ..surgery.fold import fold as fold_model
    from ..train.load import load_model, load_split

    trained = load_model(run, "cpu", best=best)
    network = trained.run.info.network
    example = torch.randn(2, network.channels, network.height, network.width)
    folded = fold_model(trained.model, example)
    report: FoldReport = folded.fold_report  # type: ignore[assignment]
    same, count = _compare(trained, folded, load_split(trained, None, "test"))
    if out is not None:
        save_program(folded, out, example)
    if json:
        document = {"run": str(run), "images": count, "same_predictions": same, "fold": report.to_dict()}
        print_json({**document, "file": None if out is None else str(out)})
        return
    screen = console()
    screen.print(report.table(), markup=False)
    screen.print(f"{same:,} of {count:,} test images get the same prediction", markup=False)
    if out is not None:
        screen.print(f"{out}: load with torch.export.load(...).module()", markup=False)


def _compare(trained: "Trained", folded: "nn.Module", images: "Split") -> tuple[int, int]:
    """Count the images on which both networks answer alike."""
    import torch

    from ..train.batches import DeviceImages

    held = DeviceImages(images, trained.scaling, trained.device)
    same = 0
    with torch.inference_mode():
        for start in range(0, len(held), 500):
            x, _ = held.batch(slice(start, start + 500))
            same += int((trained.model(x).argmax(1) == folded(x).argmax(1)).sum())
    return same, len(held)
