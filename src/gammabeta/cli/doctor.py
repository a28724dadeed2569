"""``gammabeta doctor`` and ``gammabeta recalibrate``: what is wrong with a model, and the repair."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from .model import (
    Model,
    Name,
    Weights,
    bar,
    check_folder,
    find_model,
    imported,
    load_batches,
    running,
    sample_count,
    write_weights,
)
from .output import Device, Json, Quiet, console, print_json

if TYPE_CHECKING:
    from ..doctor import Report

_SOURCES = ("pytorch", "keras", "flax", "equinox", "mxnet", "onnx")


def doctor(
    model: Name,
    weights: Weights = None,
    data: Annotated[
        str | None,
        typer.Option(help="A data set of ours, or module:loader; default: the run's own, else none."),
    ] = None,
    split: Annotated[str, typer.Option(help="test or train.")] = "train",
    batch: Annotated[int, typer.Option(min=1, help="Samples in a batch, as in training.")] = 64,
    samples: Annotated[
        int, typer.Option(min=0, help="Samples to look at, in whole batches; 0: all there are.")
    ] = 2048,
    loss: Annotated[
        str | None, typer.Option(help="module:function(output, target); default: cross-entropy if it fits.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(help=f"Framework that the weights come from: {', '.join(_SOURCES)}.")
    ] = None,
    severity: Annotated[
        str, typer.Option(help="Exit with 1 from this severity on: error, warning or note.")
    ] = "warning",
    html: Annotated[Path | None, typer.Option(help="Also write one page with pictures to this file.")] = None,
    fix: Annotated[
        str | None, typer.Option(help="recalibrate: mend the statistics, and diagnose again.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File for the mended weights.")] = None,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Say what is wrong with the batch normalization in a model: evidence, cause, remedy.

    Exit code 0: healthy. 1: findings of the asked severity; after --fix, those that remain. 2: could not run.
    """
    _check_options(severity, source, fix, out)
    subject = find_model(model, weights, device)
    loader = load_batches(subject, data, split, batch)
    loss_function = _loss(loss, subject, loader)
    screen = console(json)
    settings: dict[str, Any] = {"loss": loss_function, "source": source, "samples": samples or None}
    report = _diagnose(subject, loader, settings, batch, screen, quiet or json)
    if fix is not None and out is not None:
        if not (json or quiet):
            screen.print(report, soft_wrap=False)
            screen.print()
        report = _mend(subject, loader, settings, batch, screen, quiet or json, out)
    if html is not None:
        from ..files import write_atomically

        check_folder(html, "--html")
        write_atomically(html, report.to_html().encode(), UsageError)
    if json:
        print_json(report.to_dict())
    elif quiet:
        screen.print(report.verdict, markup=False)
    else:
        screen.print(report, soft_wrap=False)
        if out is not None:
            screen.print(f"Mended weights: {out}")
        if html is not None:
            screen.print(f"Pictures: {html}")
    return report.exit_code(severity)  # type: ignore[arg-type]


def _check_options(severity: str, source: str | None, fix: str | None, out: Path | None) -> None:
    if severity not in ("error", "warning", "note"):
        raise UsageError(f"unknown severity {severity!r}: choose error, warning or note")
    if source is not None and source not in _SOURCES:
        raise UsageError(f"unknown source {source!r}: choose one of {', '.join(_SOURCES)}")
    if fix not in (None, "recalibrate"):
        raise UsageError(f"unknown fix {fix!r}: there is only recalibrate")
    if (fix is None) != (out is None):
        raise UsageError(
            "--fix and --out go together: the mended weights need a file, and your own stay as they are"
        )


def _loss(name: str | None, subject: Model, loader: Any) -> Any:
    """The function named; else cross-entropy where the first batch's output and target are fit for it."""
    import torch

    from ..stats.batches import call, move, target
    from ..stats.preserve import preserved

    if name is not None:
        return imported(name)
    if loader is None or isinstance(loader, Iterator):
        return None
    with running(subject.name), preserved(subject.module, loader), torch.inference_mode():
        subject.module.eval()
        for batch in loader:
            there = move(batch, subject.device, None)
            output, labels = call(subject.module, there), target(there)
            if (  # these are logits (N, C, …) and integer labels (N, …)
                isinstance(output, torch.Tensor)
                and isinstance(labels, torch.Tensor)
                and labels.dtype == torch.int64
                and output.dim() == labels.dim() + 1
                and output.shape[0] == labels.shape[0]
            ):
                return torch.nn.functional.cross_entropy
            break
    return None


def _diagnose(
    subject: Model, loader: Any, settings: dict[str, Any], batch: int, screen: Any, quiet: bool
) -> "Report":
    from ..doctor import diagnose

    count = sample_count(loader, settings["samples"], batch)
    total = None if count is None else 2 * count
    with bar(screen, "diagnosing", total, quiet=quiet or loader is None) as advance, running(subject.name):
        return diagnose(subject.module, loader, progress=advance, **settings)


def _mend(
    subject: Model, loader: Any, settings: dict[str, Any], batch: int, screen: Any, quiet: bool, out: Path
) -> "Report":
    """Recalibrate, save, and diagnose what was saved."""
    from ..stats.recalibrate import recalibrate as calibrate

    if loader is None:
        raise UsageError("--fix recalibrate needs data: name a data set or module:loader with --data")
    count = sample_count(loader, settings["samples"], batch)
    with bar(screen, "recalibrating", count, quiet=quiet) as advance, running(subject.name):
        calibrate(subject.module, loader, samples=settings["samples"], progress=advance)
    write_weights(subject.module, out)
    return _diagnose(subject, loader, settings, batch, screen, quiet)


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
