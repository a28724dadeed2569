"""What the doctor says of healthy models: our own of many kinds, and other libraries'. It should be silent.

``--corpus`` takes the own ones and the light ones of others, some 200 in twenty minutes of a processor.

Own models are trained to the end on made-up data; other libraries' have random weights and are recalibrated.
Each diagnosis is a line of ``healthy.jsonl`` beside the results; a run goes on where it stopped as long as
the doctor is the same. What is not installed or is too large is left out, and counted.
"""

import argparse
import hashlib
import json
import sys
import time
import traceback
import warnings
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

import gammabeta
from gammabeta.doctor import diagnose

from ..foreign.models import everything
from ..harness import Options, Result
from ..healthy import foreign, images, tables
from ..healthy.cases import OWN, Given
from ..healthy.public import FAULTY, MOST_VALUES, light

QUICK = ("own ragged batches", "own U-Net, segmentation", "timm test_resnet", "pytorchcv resnet20_cifar10")
MADE = (tables, images)  # their cases are in OWN
TOO_LARGE = f"that have more than {foreign.LARGEST:,} parameters, too many values, or no size that runs"
SHOWING = ("html.py", "plots.py", "terminal.py", "report.py")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", action="store_true", help="own models and light public ones")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="models, such as 'own *' or 'timm resnet*'")
    parser.add_argument("--again", action="store_true", help="diagnose again what is in the file already")


def run(options: Options) -> Result:
    """Diagnose every model that is asked for, and sum up."""
    torch.set_num_threads(1)
    given = vars(options.given)
    patterns = QUICK if options.quick else tuple(given.get("only") or "*")
    corpus = given.get("corpus", False)
    chosen = [name for name in cases(corpus) if any(fnmatch(name, pattern) for pattern in patterns)]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"healthy{'-quick' if options.quick else '-corpus' if corpus else ''}.jsonl"
    code = _digest()
    kept = {} if given.get("again") else _read(path, code)
    rows = []
    for number, name in enumerate(chosen, 1):
        if name not in kept:
            kept[name] = examine(name, corpus)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"code": code, **kept[name]}) + "\n")
        rows.append(kept[name])
        print(f"{number} of {len(chosen)}: {_line(kept[name])}", file=sys.stderr, flush=True)
    ran = [row for row in rows if "left out" not in row]
    out = Counter(f"{row['case'].split()[0]} {row['left out']}" for row in rows if "left out" in row)
    notes = [f"Left out: {count} models of {why}." for why, count in out.items()]
    title, cells = "The doctor on healthy models", list(map(_cells, ran))
    part = "corpus" if corpus else ""
    return Result(title, cells, summarise(ran), notes, measured=rows, part=part)


def cases(corpus: bool = False) -> list[str]:
    """Every model's name: "own ...", or its library and name."""
    return [f"own {name}" for name in OWN] + list(light() if corpus else everything())


def examine(name: str, corpus: bool = False) -> dict[str, Any]:
    """One diagnosis: what was found, or why there is none."""
    began = time.process_time()
    row: dict[str, Any] = {"case": name}
    if name in FAULTY:
        return {**row, "left out": FAULTY[name]}
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's code
            subject = _subject(name, corpus)
            if subject is None:
                return {**row, "left out": TOO_LARGE}
            report = diagnose(subject.model, subject.loader, **subject.options)
    except ImportError:
        return {**row, "left out": "that are not installed"}
    except foreign.NotBuiltError:
        return {**row, "left out": "that their library cannot build with these packages"}
    except Exception:
        return {**row, "norms": None, "found": [["crash", "", traceback.format_exc(limit=-1)]], "notes": 0}
    found = [
        [f.check, f.severity, f"{f.layer or 'the model'}: {f.evidence}"] for f in report.at_least("warning")
    ]
    norms = len(report.evidence.layers)
    counted = {"norms": norms, "samples": report.evidence.samples, "notes": len(report.findings) - len(found)}
    unseen = {"not examined": report.evidence.not_examined}
    return {**row, **counted, "found": found, **unseen, "seconds": round(time.process_time() - began, 1)}


def _subject(name: str, corpus: bool) -> Given | None:
    if name.startswith("own "):
        return OWN[name.removeprefix("own ")]()
    return foreign.given(light()[name], MOST_VALUES) if corpus else foreign.given(everything()[name])


def _line(row: dict[str, Any]) -> str:
    if "left out" in row:
        return f"{row['case']}: left out, {row['left out']}"
    return f"{row['case']}: {row['found'] or 'healthy'}"


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    said = "; ".join(f"{check}, {severity}, {what}" for check, severity, what in row["found"])
    cells = {name: row.get(name) for name in ("case", "norms", "samples", "notes")}
    return {**cells, "errors and warnings": said or "none"}


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many models of which library are called healthy, and what was said of the others."""
    summary: dict[str, Any] = {}
    for library in dict.fromkeys(row["case"].split()[0] for row in rows):
        mine = [row for row in rows if row["case"].split()[0] == library]
        summary[library] = f"{sum(not row['found'] for row in mine)} of {len(mine)} without error or warning"
    loud = Counter(check for row in rows for check in {finding[0] for finding in row["found"]})
    summary["all"] = f"{sum(not row['found'] for row in rows)} of {len(rows)}"
    return summary | {f"models with {check}": count for check, count in loud.items()}


def _digest() -> str:
    """Stands for the code that diagnoses: another one, and every model is diagnosed anew."""
    root = Path(gammabeta.__file__).parent
    files = (
        path for folder in ("doctor", "stats", "graph") for path in sorted((root / folder).rglob("*.py"))
    )
    code = b"".join(path.read_bytes() for path in files if path.name not in SHOWING)
    return hashlib.sha256(code).hexdigest()[:12]


def _read(path: Path, code: str) -> dict[str, dict[str, Any]]:
    """The lines of a file that come from this code, the last of each model."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["case"]: line for line in lines if line.pop("code") == code}
