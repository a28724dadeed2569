"""What ``convert``, ``fold`` and ``recalibrate`` make of timm's, pytorchcv's and transformers' models.

Each model is judged in float64 by its untouched self. It writes one line of JSON a model, to
``surgery.jsonl`` beside the results, and goes on where it stopped as long as the package is the same. What is
not installed is left out, and said. Nothing is downloaded; weights are random.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import gammabeta

from ..foreign.measure import OPERATIONS, measure
from ..foreign.models import Foreign, everything
from ..harness import Options, Result

QUICK = (
    "timm test_byobnet",
    "timm test_efficientnet",
    "timm test_resnet",
    "timm mobilenetv3_small_050",
    "pytorchcv resnet20_cifar10",
    "transformers ResNet",
)
EXPORTED = ("timm test_*", "timm mobilenetv3_small_050", "timm regnetx_002", "pytorchcv resnet20_cifar10")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", metavar="NAME", help="models, such as 'timm resnet*'")
    parser.add_argument("--operation", nargs="+", choices=(*OPERATIONS, "export_onnx"), help="these alone")
    parser.add_argument("--again", action="store_true", help="measure again what is in the file already")


def run(options: Options) -> Result:
    """Measure every model that is asked for, and sum up."""
    given = vars(options.given)
    models = _chosen(options.quick, given.get("only"))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"surgery{'-quick' if options.quick else ''}.jsonl"
    code = _digest()
    kept = {} if given.get("again") else _read(path, code)
    missing: Counter[str] = Counter()
    rows = []
    for number, (name, foreign) in enumerate(models.items(), 1):
        row = kept.get(name)
        if row is None:
            row = _row(foreign, given.get("operation"), missing)
            if row is None:
                continue
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"code": code, **row}) + "\n")
        rows.append(row)
        print(f"{number} of {len(models)}: {_line(row)}", file=sys.stderr, flush=True)
    summary = summarise(rows)
    notes = [f"{count} models of {library} left out: not installed." for library, count in missing.items()]
    notes += [f"{row['model']}: left out, {row['skipped']}." for row in rows if "skipped" in row]
    table = [_cells(row) for row in rows if "skipped" not in row]
    return Result("Surgery on models of other libraries, float64, CPU", table, summary, notes, measured=rows)


def _chosen(quick: bool, only: list[str] | None) -> dict[str, Foreign]:
    models = everything()
    if only:
        return {n: models[n] for pattern in only for n in models if fnmatch(n, pattern)}
    return {n: f for n, f in models.items() if n in QUICK} if quick else models


def _row(foreign: Foreign, operations: list[str] | None, missing: Counter[str]) -> dict[str, Any] | None:
    exported = any(fnmatch(foreign.name, pattern) for pattern in EXPORTED)
    usual = (*OPERATIONS, "export_onnx") if exported else OPERATIONS
    try:
        return measure(foreign, tuple(operations or usual))
    except ImportError:
        missing[foreign.name.split()[0]] += 1
        return None


def _digest() -> str:
    """Stands for the package's code: another one, and every model is measured anew."""
    root = Path(gammabeta.__file__).parent
    text = b"".join(path.read_bytes() for path in sorted(root.rglob("*.py")))
    return hashlib.sha256(text).hexdigest()[:12]


def _read(path: Path, code: str) -> dict[str, dict[str, Any]]:
    """The lines of a file that were measured with this code, the last of each model."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["model"]: line for line in lines if line.pop("code") == code}


def _line(row: dict[str, Any]) -> str:
    if "skipped" in row:
        return f"{row['model']}: left out, {row['skipped']}"
    found = [
        f"{name} {row[name]['outcome']}" + (f" ({row[name]['why']})" if "why" in row[name] else "")
        for name in (*OPERATIONS, "export_onnx")
        if name in row
    ]
    ours = row.get("convert with example", row.get("convert", {}))
    counts = f"{ours.get('ours', 0)}/{row['norms']} ours, {ours.get('fused', 0)}/{row['activations']} fused"
    return f"{row['model']}, {row['size']} px, {counts}, {', '.join(found)}, {row['seconds']} s"


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    cells = {"case": row["model"], "pixels": row["size"], "norms": row["norms"]}
    for name in ("convert", "convert with example"):
        found = row.get(name, {})
        cells |= {
            name: found.get("outcome"),
            f"ours, {name}": found.get("ours"),
            f"fused, {name}": f"{found.get('fused', 0)} of {row['activations']}",
        }
    fold = row.get("fold", {})
    cells |= {
        "train in float32": row.get("train in float32", {}).get("outcome"),
        "fold": fold.get("outcome"),
        "folded": fold.get("folded"),
    }
    return cells | {name: row.get(name, {}).get("outcome") for name in ("recalibrate", "export_onnx")}


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Outcomes of each operation, what was reached, and the reasons for the rest."""
    ran = [row for row in rows if "skipped" not in row]
    summary: dict[str, Any] = {"models": f"{len(ran)}, and {len(rows) - len(ran)} left out"}
    for name in (*OPERATIONS, "export_onnx"):
        outcomes = Counter(row[name]["outcome"] for row in ran if name in row)
        if outcomes:
            summary[name] = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    norms = sum(row["norms"] for row in ran)
    activations = sum(row["activations"] for row in ran)
    for name in ("convert", "convert with example"):
        ours = sum(row.get(name, {}).get("ours", 0) for row in ran)
        fused = sum(row.get(name, {}).get("fused", 0) for row in ran)
        summary[f"{name}, reached"] = (
            f"{ours} of {norms} batch norms ours ({100 * ours / max(norms, 1):.1f} %), "
            f"{fused} of {activations} activations behind them fused "
            f"({100 * fused / max(activations, 1):.1f} %)"
        )
        reasons = Counter(why for row in ran for why in row.get(name, {}).get("reasons", {}).values())
        summary[f"{name}, not fused"] = "; ".join(f"{n} {why}" for why, n in reasons.most_common(12))
    folded = sum(row.get("fold", {}).get("folded", 0) for row in ran)
    summary["folded"] = f"{folded} of {norms} batch norms"
    return summary
