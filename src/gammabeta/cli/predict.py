"""``gammabeta predict``: what is in these pictures."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..errors import DataError, UsageError
from .model import Best, bar
from .output import Device, Json, Quiet, console, fail, print_json

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..data.picture import Style
    from ..data.preparation import Preparation

_BATCH = 64  # pictures that are held at once, fewer of large ones
_STDIN = "-"
_MOST_STDIN = 1 << 30  # bytes of one picture, or of a list of paths


@dataclass(frozen=True)
class _Classifier:
    classes: Sequence[str]
    preparation: Preparation
    probabilities: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class _Answer:
    """The likeliest classes of one picture, or why there are none; ``unlike``: what is strange about it."""

    image: str
    guesses: Sequence[tuple[str, float]] = ()
    distance: float | None = None
    unlike: str | None = None
    error: str | None = None


def predict(
    run: Annotated[Path, typer.Argument(help="A run folder, or an ONNX file that `export` wrote.")],
    images: Annotated[
        list[str],
        typer.Argument(
            help="Pictures of any common format and size, ink dark or light; folders of them; - for "
            "standard input: a picture, or paths of pictures, one a line."
        ),
    ],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show for each picture.")] = 1,
    style: Annotated[
        str | None,
        typer.Option(
            help="How a picture is prepared: digit, object or plain; default: as training learned it."
        ),
    ] = None,
    best: Best = False,
    device: Device = "auto",
    csv_wanted: Annotated[
        bool, typer.Option("--csv", help="Print a table: image, rank, class, probability, distance, unlike.")
    ] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Name the class of each picture, and how probable it is; an ONNX file needs no torch.

    A picture unlike those of the training is marked, and its probabilities are drawn towards equal shares.
    Pictures that cannot be read are named at the end, on standard error; the exit code is then 2.
    """
    if style not in (None, "digit", "object", "plain"):
        raise UsageError(f"unknown style {style!r}: choose digit, object or plain")
    if csv_wanted and json:
        raise UsageError("--csv and --json both want standard output: give one of them")
    onnx = run.suffix.lower() == ".onnx"
    classifier = _from_onnx(run) if onnx else _from_run(run, device, best)
    if style is not None:
        preparation = replace(classifier.preparation, style=cast("Style", style))
        classifier = replace(classifier, preparation=preparation)
    found = list(_listed(images))
    show = _Json(run) if json else _Table() if csv_wanted else _Lines()
    failures: list[str] = []
    with _progress(len(found), quiet, streams=not json) as advance:
        for answer in _answers(classifier, found, top):
            if answer.error is not None:
                failures.append(answer.error)
            show.add(answer)
            advance(1)
    show.end()
    for failure in failures:
        fail(failure, 2)
    if failures and len(found) > 1:
        fail(f"{len(failures)} of {len(found)} have no answer; the others are answered", 2)
    return 2 if failures else 0


def _from_run(run: Path, device: str, best: bool) -> _Classifier:
    from ..train.load import load_model

    trained = load_model(run, device, best=best)
    return _Classifier(
        trained.run.info.network.classes,
        trained.preparation,
        lambda pictures: trained.probabilities(pictures).numpy(),
    )


def _from_onnx(file: Path) -> _Classifier:
    from ..data.onnxfile import OnnxClassifier

    model = OnnxClassifier.open(file)
    return _Classifier(model.classes, model.preparation, model.probabilities)


def _progress(count: int, quiet: bool, *, streams: bool) -> Any:
    """A bar on standard error, unless answers run over the same terminal."""
    screen = console(True)
    shown = not quiet and count > 1 and screen.is_terminal and not (streams and sys.stdout.isatty())
    return bar(screen, "pictures", count, quiet=False) if shown else nullcontext(lambda _: None)


def _listed(images: list[str]) -> Iterator[tuple[str, Any]]:
    """Each picture's name, and its path, its bytes or the error that stands for it."""
    if images.count(_STDIN) > 1:
        raise UsageError("standard input (-) can be read once")
    for image in images:
        if image == _STDIN:
            yield from _from_stdin()
        elif os.path.isdir(image):  # noqa: PTH112 -- Path.is_dir raises where a name is too long
            yield from _in_folder(Path(image))
        else:
            yield image, Path(image)


def _in_folder(folder: Path) -> Iterator[tuple[str, Any]]:
    """The pictures, by their names, in a folder and those below it; hidden ones are left out."""
    from ..data.decode import SUFFIXES

    count = 0
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                count += 1
                yield str(Path(where, name)), Path(where, name)
    if not count:
        yield (
            str(folder),
            DataError(f"{folder}: no pictures in this folder; their names end in .png, .jpg, …"),
        )


def _from_stdin() -> Iterator[tuple[str, Any]]:
    content = sys.stdin.buffer.read(_MOST_STDIN + 1)
    if len(content) > _MOST_STDIN:
        raise DataError("standard input: more than 1 GB; give the files by name")
    lines = content[: 1 << 24].split(b"\0" if content.rstrip(b"\n").endswith(b"\0") else b"\n")
    paths = [os.fsdecode(line.rstrip(b"\r")) for line in lines if line.strip()]
    if paths and len(content) < 1 << 24 and b"\0" not in os.fsencode(paths[0]) and os.path.exists(paths[0]):  # noqa: PTH110
        yield from _listed([path for path in paths if path != _STDIN])
    else:
        yield _STDIN, io.BytesIO(content)


def _answers(classifier: _Classifier, found: list[tuple[str, Any]], top: int) -> Iterator[_Answer]:
    """Answers in the order of the pictures, which are read and classified in batches."""
    height, width = classifier.preparation.size
    batch = max(1, min(_BATCH, (_BATCH << 14) // (height * width)))
    for start in range(0, len(found), batch):
        yield from _batch(classifier, found[start : start + batch], top)


def _batch(classifier: _Classifier, found: list[tuple[str, Any]], top: int) -> Iterator[_Answer]:
    import numpy as np

    like = classifier.preparation.like
    pictures: list[npt.NDArray[np.uint8]] = []
    errors: list[str | None] = []
    for _, source in found:
        try:
            if isinstance(source, DataError):
                raise source
            pictures.append(classifier.preparation.prepare(source))
            errors.append(None)
        except DataError as error:
            errors.append(str(error))
    row = 0
    if pictures:
        stack = np.stack(pictures)
        shares = classifier.probabilities(stack)
        distances = None if like is None else like.distance(stack)
        if like is not None and distances is not None:
            shares = like.tempered(shares, distances)
    for (name, _), message in zip(found, errors, strict=True):
        if message is not None:
            yield _Answer(name, error=message)
            continue
        likeliest = np.argsort(-shares[row], kind="stable")[:top]
        guesses = [(classifier.classes[int(at)], float(shares[row, at])) for at in likeliest]
        distance = None if distances is None else float(distances[row])
        unlike = None if like is None else like.complaint(stack[row], distance or 0.0)
        yield _Answer(name, guesses, distance, unlike)
        row += 1


class _Lines:
    """A line a picture."""

    def add(self, answer: _Answer) -> None:
        if answer.error is None:
            shown = ", ".join(f"{name} {probability:.1%}" for name, probability in answer.guesses)
            doubt = f" ({answer.unlike})" if answer.unlike else ""
            console().print(f"{answer.image}: {shown}{doubt}", markup=False)

    def end(self) -> None:
        """Nothing follows the last line."""


class _Table:
    """CSV with a header, a row for each class of each picture."""

    def __init__(self) -> None:
        self._writer = csv.writer(sys.stdout, lineterminator="\n")
        self._writer.writerow(["image", "rank", "class", "probability", "distance", "unlike"])

    def add(self, answer: _Answer) -> None:
        distance = "" if answer.distance is None else f"{answer.distance:.3g}"
        for rank, (name, probability) in enumerate(answer.guesses, 1):
            cells = [
                _written(answer.image),
                rank,
                _written(name),
                f"{probability:.6g}",
                distance,
                "yes" if answer.unlike else "no",
            ]
            self._writer.writerow(cells)

    def end(self) -> None:
        sys.stdout.flush()


def _written(text: str) -> str:
    """Text as standard output can take it: what its encoding lacks is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


class _Json:
    """One object, when all are answered."""

    def __init__(self, run: Path) -> None:
        self._document: dict[str, Any] = {"run": str(run), "predictions": [], "errors": []}

    def add(self, answer: _Answer) -> None:
        if answer.error is not None:
            self._document["errors"].append({"image": answer.image, "error": answer.error})
            return
        named = [{"class": name, "probability": probability} for name, probability in answer.guesses]
        self._document["predictions"].append(
            {
                "image": answer.image,
                "predictions": named,
                "distance": answer.distance,
                "unlike": answer.unlike,
            }
        )

    def end(self) -> None:
        print_json(self._document)
