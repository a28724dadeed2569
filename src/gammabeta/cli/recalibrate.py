"""``gammabeta recalibrate``: exact running statistics for a model, saved to a file."""

import time
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .model import Name, Weights, bar, find_model, load_batches, running, sample_count, write_weights
from .output import Device, Json, Quiet, console, print_json


def recalibrate(
    model: Name,
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the weights: .safetensors or .pt.")],
    weights: Weights = None,
    data: Annotated[
        str | None, typer.Option(help="A data set of ours, or module:loader; default: the run's own.")
    ] = None,
    split: Annotated[
        str, typer.Option(help="test or train; test data should not be used for this.")
    ] = "train",
    batch: Annotated[int, typer.Option(min=1, help="Samples in a batch.")] = 256,
    samples: Annotated[int, typer.Option(min=0, help="Samples to use, in whole batches; 0: all.")] = 0,
    mode: Annotated[
        str, typer.Option(help="joint: one pass; in-order: one pass a layer, exact for any batch size.")
    ] = "joint",
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Replace the running statistics by the exact mean and variance over a data set.

    The model's own files stay as they are.
    """
    from ..graph.layers import batch_norm_layers
    from ..stats.recalibrate import recalibrate as calibrate

    if mode not in ("joint", "in-order"):
        raise UsageError(f"unknown mode {mode!r}: choose joint or in-order")
    subject = find_model(model, weights, device)
    loader = load_batches(subject, data, split, batch)
    if loader is None:
        raise UsageError("recalibration needs data: name a data set or module:loader with --data")
    screen = console(json)
    count = sample_count(loader, samples or None, batch)
    seen: list[int] = []
    clock = time.perf_counter()
    total = count if mode == "joint" else None
    with bar(screen, "recalibrating", total, quiet=quiet or json) as advance, running(model):

        def advanced(size: int) -> None:
            seen.append(size)
            advance(size)

        calibrate(
            subject.module,
            loader,
            samples=samples or None,
            mode=mode,  # type: ignore[arg-type]
            progress=advanced,
        )
    seconds = time.perf_counter() - clock
    write_weights(subject.module, out)
    layers = len(batch_norm_layers(subject.module))
    if json:
        document = {"out": str(out), "layers": layers, "samples": sum(seen), "mode": mode}
        print_json({**document, "seconds": round(seconds, 4)})
    elif not quiet:
        screen.print(
            f"{layers} layers recalibrated from {sum(seen):,} samples in {seconds:.2f} s: {out}", markup=False
        )
