"""``gammabeta reproduce``: claims about batch normalization, re-made here, with a verdict on each."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..studies import CATALOG, find
from .output import Json, Quiet, Screen, console, print_json

if TYPE_CHECKING:
    from ..studies.conduct import Piece
    from ..studies.study import Study


def _complete(incomplete: str) -> list[tuple[str, str]]:
    names = {**CATALOG, "all": "every study"}
    return [(name, about) for name, about in names.items() if name.startswith(incomplete)]


def reproduce(
    studies: Annotated[
        list[str] | None,
        typer.Argument(help="Studies by name, or all; none: list them.", autocompletion=_complete),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Seeds 0, 1, … with which each is run.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="A few seconds each, to see that it works.")] = False,
    data: Annotated[
        str | None,
        typer.Option(help="Fashion-MNIST, by name (it is downloaded) or path; default: MNIST in its place."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for reports and pictures.")] = Path(
        "studies"
    ),
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Processes; default: one for each core, with --quick one in all."),
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Re-make what papers claim about batch normalization, and say whether it holds here.

    gammabeta reproduce gradient-explosion --seeds 3
    """
    screen = console(json)
    if not studies:
        _list(screen, json)
        return
    chosen = [find(name) for name in (CATALOG if "all" in studies else dict.fromkeys(studies))]
    from ..files import make_folder
    from ..studies.conduct import Piece, dataset_for
    from ..studies.jobs import cores

    for study in chosen:
        dataset_for(study, data)  # what cannot be is an error before the work, not after it
    make_folder(out)
    pieces = [Piece(study.name, seed, quick, data) for study in chosen for seed in range(seeds)]
    documents = []
    for document in _run(pieces, screen, jobs or (1 if quick else cores()), seeds, quiet=quiet or json):
        from ..studies.report import write

        study = find(document["study"])
        written = write(study, document, out)
        documents.append({**_summary(document), "files": [str(path) for path in written]})
        if not json:
            _print(screen, study, document, written)
    if json:
        print_json({"studies": documents})


def _list(screen: Screen, json: bool) -> None:
    if json:
        print_json({"studies": CATALOG})
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, about in CATALOG.items():
        table.add_row(name, about)
    screen.print(table, soft_wrap=False)


def _run(
    pieces: "list[Piece]", screen: Screen, jobs: int, seeds: int, *, quiet: bool
) -> Iterator[dict[str, Any]]:
    """Yield each study's document when its last seed is done, under a bar whose pieces are all seeds.

    What is yielded is kept if the rest is interrupted. In one process the bar counts steps, too.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..studies.conduct import conclude
    from ..studies.jobs import measured

    steps = TextColumn("seeds{task.fields[steps]}")
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), steps, TimeElapsedColumn())
    found: dict[str, list[dict[str, Any]]] = {}
    with Progress(*columns, console=screen, disable=quiet, transient=True) as progress:
        task = progress.add_task(pieces[0].study, total=len(pieces), steps="")
        taken = 0

        def told(count: int) -> None:
            nonlocal taken
            taken += count
            progress.update(task, steps=f", {taken:,} steps")

        for piece, one in measured(pieces, jobs, told):
            progress.update(task, advance=1, description=piece.study)
            done = found.setdefault(piece.study, [])
            done.append(one)
            if len(done) == seeds:
                yield conclude(find(piece.study), done, piece.clothing, quick=piece.quick)


def _summary(document: dict[str, Any]) -> dict[str, Any]:
    """A document without what single seeds gave."""
    return {key: value for key, value in document.items() if key != "seeds"}


def _print(screen: Screen, study: "Study", document: dict[str, Any], written: list[Path]) -> None:
    quick = ", --quick: no evidence" if document["quick"] else ""
    screen.print(f"{study.name}: {document['verdict']} ({document['seconds']:.0f} s{quick})")
    for each in document["criteria"]:
        holds = "holds" if each["holds"] else "fails"
        screen.print(f"  {holds}, {each['seeds']} of {each['of']} seeds: {each['says']}")
    page = next(path for path in written if path.suffix == ".md")
    screen.print(f"  {os.fspath(page)}")
