"""``gammabeta predict``: what is in these pictures."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..errors import DataError, UsageError
from ..loading import load
from ..text import for_terminal
from .model import Best, bar, check_folder
from .output import Device, Json, Quiet, console, fail, print_json

if TYPE_CHECKING:
    from ..data.classify import Prediction
    from ..data.picture import Style

_MOST_SHOWN = 240  # pictures on a sheet
_STDIN = "-"
_MOST_STDIN = 1 << 30  # bytes of one picture, or of a list of paths


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
    sheet: Annotated[
        Path | None,
        typer.Option("--show", help="Write what the network saw and said as a PNG, or into a folder."),
    ] = None,
    csv_wanted: Annotated[
        bool,
        typer.Option(
            "--csv", help="Print a table: image, rank, class, probability, distance, unlike, doubt, why."
        ),
    ] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Name the class of each picture, and how probable it is; an ONNX file needs no torch.

    A picture unlike those of the training is marked, and its probabilities are drawn towards equal shares. An
    answer is in doubt then, where no class is probable, and where several digits are found on a picture.
    Pictures that cannot be read are named at the end, on standard error; the exit code is then 2.
    """
    if style not in (None, "digit", "object", "plain"):
        raise UsageError(f"unknown style {style!r}: choose digit, object or plain")
    if csv_wanted and json:
        raise UsageError("--csv and --json both want standard output: give one of them")
    target = None if sheet is None else _sheet_file(sheet)
    classifier = load(run, device, best=best).classifier
    if style is not None:
        preparation = replace(classifier.preparation, style=cast("Style", style))
        classifier = replace(classifier, preparation=preparation)
    found = list(_listed(images))
    show = _Json(run) if json else _Table() if csv_wanted else _Lines()
    failures: list[str] = []
    shown: list[Prediction] = []
    with _progress(len(found), quiet, streams=not json) as advance:
        for name, answer in classifier.answers(found, top):
            if isinstance(answer, DataError):
                failures.append(str(answer))
                show.failed(name, str(answer))
            else:
                show.add(answer)
                shown += [answer] if target is not None and len(shown) < _MOST_SHOWN else []
            advance(1)
    show.end()
    if target is not None:
        _write_sheet(target, shown, len(found) - len(failures), run)
    for failure in failures:
        fail(failure, 2)
    if failures and len(found) > 1:
        fail(f"{len(failures)} of {len(found)} have no answer; the others are answered", 2)
    return 2 if failures else 0


def _sheet_file(path: Path) -> Path:
    """Where ``--show`` writes: the picture that is named, or ``predictions.png`` in a folder."""
    folder = path.is_dir() or not path.suffix
    if not folder and path.suffix.lower() != ".png":
        raise UsageError(f"--show writes a PNG: name a folder or a file such as {path.stem}.png")
    if not folder:
        check_folder(path, "--show")
    return path / "predictions.png" if folder else path


def _write_sheet(target: Path, shown: Sequence[Prediction], count: int, run: Path) -> None:
    """Draw the prepared pictures with their answers; of very many, the first."""
    if not shown:
        return
    import numpy as np

    from ..files import make_folder
    from ..train.plots import save_figure, seen

    make_folder(target.parent)
    lines = [
        (Path(answer.image).name, f"{answer.label} {answer.probability:.1%}", answer.doubt)
        for answer in shown
    ]
    some = "" if len(shown) == count else f"; the first {len(shown)} of {count:,}"
    title = f"What {run.name} saw{some}"
    save_figure(seen(np.stack([answer.prepared for answer in shown]), lines, title), target)
    console(True).print(f"Picture: {target}", markup=False)


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
    if paths and len(content) < 1 << 24 and _is_path(paths[0]):
        yield from _listed([path for path in paths if path != _STDIN])
    else:
        yield _STDIN, io.BytesIO(content)


def _is_path(line: str) -> bool:
    """Whether the first line of standard input is a path, of something here or by its looks."""
    from ..data.decode import SUFFIXES

    return "\0" not in line and (os.path.exists(line) or line.lower().endswith(SUFFIXES))  # noqa: PTH110


class _Lines:
    """A line a picture."""

    def add(self, answer: Prediction) -> None:
        console().print(str(answer), markup=False)

    def failed(self, image: str, error: str) -> None:
        """Errors follow at the end."""

    def end(self) -> None:
        """Nothing follows the last line."""


class _Table:
    """CSV with a header, a row for each class of each picture."""

    def __init__(self) -> None:
        self._writer = csv.writer(sys.stdout, lineterminator="\n")
        columns = ["image", "rank", "class", "probability", "distance", "unlike", "doubt", "why"]
        self._writer.writerow(columns)

    def failed(self, image: str, error: str) -> None:
        """Errors follow at the end."""

    def add(self, answer: Prediction) -> None:
        distance = "" if answer.distance is None else f"{answer.distance:.3g}"
        for rank, (name, probability) in enumerate(answer.top, 1):
            cells = [
                _written(answer.image),
                rank,
                _written(name),
                f"{probability:.6g}",
                distance,
                "yes" if answer.unlike else "no",
                "yes" if answer.doubt else "no",
                _written(answer.why or ""),
            ]
            self._writer.writerow(cells)

    def end(self) -> None:
        sys.stdout.flush()


def _written(text: str) -> str:
    """Text as standard output can take it: what its encoding lacks, or a terminal obeys, is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    if _on_terminal():  # a name is data in a file, and must not act on a terminal
        return for_terminal(text, encoding)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _on_terminal() -> bool:
    return sys.stdout.isatty()


class _Json:
    """One object, when all are answered."""

    def __init__(self, run: Path) -> None:
        self._document: dict[str, Any] = {"run": str(run), "predictions": [], "errors": []}

    def failed(self, image: str, error: str) -> None:
        self._document["errors"].append({"image": image, "error": error})

    def add(self, answer: Prediction) -> None:
        named = [{"class": name, "probability": probability} for name, probability in answer.top]
        self._document["predictions"].append(
            {
                "image": answer.image,
                "predictions": named,
                "distance": answer.distance,
                "unlike": answer.unlike,
                "doubt": answer.doubt,
                "why": answer.why,
            }
        )

    def end(self) -> None:
        print_json(self._document)
