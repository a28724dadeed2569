"""Write docs/studies.md and its pictures from what `gammabeta reproduce` wrote: no number is typed by hand.

    gammabeta reproduce all --seeds 3 --data fashion-mnist --out benchmarks/results/studies
    python -m scripts.studies_page

reads the JSON files of that folder, and keeps nothing else of it.
"""

import sys
from pathlib import Path

from gammabeta.studies import CATALOG, find
from gammabeta.studies.report import draw, read, section

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, PICTURES = ROOT / "benchmarks/results/studies", ROOT / "docs/studies.md", ROOT / "docs/studies"

HEAD = """\
# Studies

Much is said of batch normalization. `gammabeta reproduce` re-makes what papers claim of it, at the scale of
MNIST on two cores, and says of each claim whether it holds here, by a criterion that was written down
before the run.

```sh
gammabeta reproduce
gammabeta reproduce gradient-explosion --seeds 5
gammabeta reproduce all --quick
```

The first line lists the studies. Each writes a report, its picture (light and dark, PNG and SVG) and a JSON
file with every number of every seed into `--out` (by default `studies`). Studies of clothing take
Fashion-MNIST from `--data`, by name or path, and say so where MNIST stands in for it. `--quick` shows in
seconds that a study runs, and is no evidence. Each core gets a process (`--jobs`); a study is written as soon
as its last seed is done, so an interruption keeps what is finished.

*Reproduced*: every criterion holds, of the mean over the seeds and of more than half of them. *Partly*: the
first one does, or at least half. What is reproduced is the claim at this scale and nothing more; each
section says what differs from the paper, and what of a criterion or a measurement was changed after a first
run, and why. [The design](design/studies.md) says how a study is made. This
page is written by `python -m scripts.studies_page` from [the results](../benchmarks/results).
"""


def page(folder: Path) -> str:
    """The whole page: a table of verdicts, then a section a study."""
    found = [(find(name), document) for name in CATALOG if (document := read(folder, name)) is not None]
    rows = ["| study | paper | verdict | seconds a seed |", "|---|---|---|---|"]
    for study, document in found:
        seconds = document["seconds"] / len(document["seeds"])
        paper = (
            study.paper.partition(", “")[0]
            if study.paper.count("“") == 1
            else study.paper.split("; ")[0].partition(", “")[0]
        )
        anchor = study.title.lower().replace(" ", "-")
        rows.append(f"| [{study.title}](#{anchor}) | {paper} | {document['verdict']} | {seconds:.0f} |")
    parts = [HEAD, "\n".join(rows) + "\n"]
    parts += [f"## {study.title}\n\n{section(study, document, 'studies/')}" for study, document in found]
    return "\n".join(parts)


def main(folder: Path) -> None:
    """Write the page and the pictures; drop what is no JSON from the folder of results."""
    PICTURES.mkdir(exist_ok=True)
    for name in CATALOG:
        if (document := read(folder, name)) is not None:
            draw(find(name), document, PICTURES, ("svg",))
    PAGE.write_text(page(folder), encoding="utf-8")
    if folder == RESULTS and folder.exists():
        for path in folder.iterdir():
            if path.suffix != ".json":
                path.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
