"""What ``fold`` and ``export`` take: a run folder, or a model of the user's and the shape of its input."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..train.load import Trained

Name = Annotated[str, typer.Argument(help="A run folder, or module:factory.")]
Weights = Annotated[Path | None, typer.Option(help="A safetensors file for module:factory's model.")]
Shape = Annotated[
    str | None,
    typer.Option(help="One input of module:factory's model, such as 3x224x224, without the batch."),
]
Best = Annotated[bool, typer.Option("--best", help="The run's best epoch's weights, not the last's.")]


@dataclass(frozen=True)
class Shipped:
    """A model on the CPU in evaluation mode, an input of batch size 2, and the run it came from, if any."""

    name: str
    model: nn.Module
    example: Tensor
    trained: Trained | None


def load_shipped(name: str, weights: Path | None, shape: str | None, best: bool) -> Shipped:
    """Open a run folder, or make the user's model.

    Raises:
        UsageError, RunError, WeightsError: what is missing or does not fit, and what to do.
    """
    import torch

    if Path(name).is_dir():
        from ..train.load import load_model

        trained = load_model(name, "cpu", best=best)
        network = trained.run.info.network
        example = torch.randn(2, network.channels, network.height, network.width)
        return Shipped(name, trained.model, example, trained)
    from .target import load_target

    model = load_target(name, weights, "cpu").model.eval()  # a wrong name is told before a missing shape
    return Shipped(name, model, torch.randn(2, *_parsed(shape)), None)


def _parsed(shape: str | None) -> list[int]:
    if shape is None:
        raise UsageError("say the shape of one input with --shape, such as --shape 3x224x224")
    parts = shape.lower().replace(",", "x").split("x")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--shape is sizes joined by x, such as 3x224x224, not {shape!r}")
    return [int(part) for part in parts]
