"""``gammabeta doctor`` and ``gammabeta recalibrate``: what is wrong with a model, and the repair."""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
        typer.Option(
            help="A data set, or module:loader, which gives batches; default: the run's own, if any."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Part of a data set: train or test.")] = "train",
    batch: Annotated[int, typer.Option(min=1, help="Samples of a data set in a batch, as in training.")] = 64,
    samples: Annotated[
        int, typer.Option(min=0, help="Samples to look at, in whole batches; 0: all there are.")
    ] = 2048,
    loss: Annotated[
        str | None,
        typer.Option(
            help="module:function, called with output and target; default: cross-entropy if it fits."
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help=f"Framework that trained the weights: {', '.join(_SOURCES)}.")
    ] = None,
    severity: Annotated[
        str, typer.Option(help="Exit with 1 from this severity on: error, warning or note.")
    ] = "warning",
    html: Annotated[Path | None, typer.Option(help="Also write one page with pictures to this file.")] = None,
    fix: Annotated[
        str | None, typer.Option(help="recalibrate: renew the statistics, save to --out, diagnose again.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File for the mended weights.")] = None,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Say what is wrong with the batch normalization in a model: evidence, cause, remedy.

    gammabeta doctor models:make --weights net.pt --data models:loader

    Without data only the model's modules and numbers are looked at. Its files stay as they are.

    Exit code 0: healthy. 1: findings of the asked severity; after --fix, those that remain. 2: could not run.
    """
    _check_options(severity, source, fix, out)
    subject = find_model(model, weights, device)
    loader = load_batches(subject, data, split, batch)
    if fix is not None and loader is None:
        raise UsageError("--fix recalibrate needs data: name a data set or module:loader with --data")
    for file, option in ((out, "--out"), (html, "--html")):
        if file is not None:
            check_folder(file, option)
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
        from ..train.given import imported

        function = imported(name)
        if not callable(function):
            raise UsageError(f"{name} is {type(function).__name__}: --loss must name a function")
        return function
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
        str | None,
        typer.Option(help="A data set, or module:loader, which gives batches; default: the run's own."),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Part of a data set: train or test, which should not be used for this.")
    ] = "train",
    batch: Annotated[int, typer.Option(min=1, help="Samples of a data set in a batch.")] = 256,
    samples: Annotated[int, typer.Option(min=0, help="Samples to use, in whole batches; 0: all.")] = 0,
    mode: Annotated[
        str, typer.Option(help="joint: one pass; in-order: one pass a layer, exact for any batch size.")
    ] = "joint",
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Replace the running statistics by the exact mean and variance over a data set.

    gammabeta recalibrate models:make --weights net.pt --data models:loader --out mended.safetensors

    The model's own files stay as they are. Layers that keep their statistics are named.
    """
    from ..stats.norms import frozen_norms, with_statistics
    from ..stats.recalibrate import recalibrate as calibrate

    if mode not in ("joint", "in-order"):
        raise UsageError(f"unknown mode {mode!r}: choose joint or in-order")
    subject = find_model(model, weights, device)
    loader = load_batches(subject, data, split, batch)
    if loader is None:
        raise UsageError("recalibration needs data: name a data set or module:loader with --data")
    check_folder(out, "--out")
    screen = console(json)
    count = sample_count(loader, samples or None, batch)
    layers = with_statistics(subject.module)
    layers = {name: layers[name] for name in layers.keys() - frozen_norms(subject.module, layers)}
    seen: list[int] = []
    clock = time.perf_counter()
    total = count if mode == "joint" else None
    progress = bar(screen, "recalibrating", total, quiet=quiet or json)
    with _told_kept() as kept, progress as advance, running(model):

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
    done = len(layers.keys() - kept)
    if json:
        document = {"out": str(out), "layers": done, "samples": sum(seen), "mode": mode, "kept": kept}
        print_json({**document, "seconds": round(seconds, 4)})
    elif not quiet:
        what = f"{done} layer{'s' * (done != 1)} recalibrated from {sum(seen):,} samples"
        screen.print(f"{what} in {seconds:.2f} s: {out}", markup=False)


@contextmanager
def _told_kept() -> Iterator[dict[str, str]]:
    """The layers that recalibration leaves as they are, with the reasons, which are told as a note, too."""
    from ..stats.recalibrate import NotCalibrated

    kept: dict[str, str] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NotCalibrated)
        yield kept
    for warning in caught:
        message: Any = warning.message
        if isinstance(message, NotCalibrated):
            kept |= message.kept
        warnings.warn_explicit(message, warning.category, warning.filename, warning.lineno)
