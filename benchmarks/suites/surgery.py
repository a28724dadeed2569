"""What ``convert``, ``fold`` and ``recalibrate`` make of timm's, pytorchcv's and transformers' models.

Each model is judged in float64 by its untouched self. It writes one line of JSON a model, to
``surgery.jsonl`` beside the results, and goes on where it stopped as long as the package is the same. What is
not installed is left out, and said. Nothing is downloaded; weights are random.
"""

import argparse
import hashlib
import json
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch

import gammabeta

from ..foreign.measure import OPERATIONS, measure
from ..foreign.models import Foreign, everything
from ..harness import Options, Result, machine, report

QUICK = (
    "timm test_byobnet",
    "timm test_efficientnet",
    "timm test_resnet",
    "timm mobilenetv3_small_050",
    "pytorchcv resnet20_cifar10",
    "transformers ResNet",
)
# An export takes ten times as long as all else: the smallest of some families.
EXPORTED = (
    "timm test_*",
    "timm cpubone_nano",
    "timm densenet121",
    "timm dla46x_c",
    "timm efficientvit_b0",
    "timm efficientvit_m0",
    "timm ese_vovnet19b_slim_dw",
    "timm fasternet_t0",
    "timm fastvit_t8",
    "timm ghostnet_050",
    "timm hgnetv2_b0",
    "timm lcnetv2_small",
    "timm levit_128s",
    "timm mobilenetv3_small_050",
    "timm mobilevit_xxs",
    "timm regnetx_002",
    "timm repghostnet_050",
    "timm rexnet_100",
    "timm shvit_s1",
    "timm starnet_s050",
    "timm resnet10t",
    "timm resnetv2_18",
    "pytorchcv resnet20_cifar10",
    "transformers MobileNetV2",
    "transformers ResNet",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="models, as 'timm resnet*'; the rows of others are kept"
    )
    parser.add_argument("--operation", nargs="+", choices=(*OPERATIONS, "export_onnx"), help="these alone")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes, of one thread each")
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
    rows = [kept[name] for name in models if name in kept]
    others = [name for name in models if name not in kept]
    for number, (name, row) in enumerate(_measured(others, given), len(rows) + 1):
        if row is None:  # its library is not installed
            missing[name.split()[0]] += 1
            continue
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"code": code, **row}) + "\n")
        rows.append(row)
        print(f"{number} of {len(models)}: {_line(row)}", file=sys.stderr, flush=True)
    if given.get("only"):
        stem = report.stem_of("surgery", options.quick)
        rows += [row for row in report.measured(stem, options.out) if row["model"] not in models]
    order = list(everything())
    rows.sort(key=lambda row: order.index(row["model"]))
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


def _measured(names: list[str], given: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Each model with its row, or None where its library is not installed."""
    row = partial(_row, operations=given.get("operation"))
    if given.get("jobs", 1) == 1:
        yield from ((name, row(name)) for name in names)
        return
    start = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given["jobs"], start, torch.set_num_threads, (1,)) as pool:
        waiting = {pool.submit(row, name): name for name in names}
        yield from ((waiting[done], done.result()) for done in as_completed(waiting))


def _row(name: str, operations: list[str] | None) -> dict[str, Any] | None:
    usual = (
        (*OPERATIONS, "export_onnx") if any(fnmatch(name, pattern) for pattern in EXPORTED) else OPERATIONS
    )
    try:
        row = measure(everything()[name], tuple(operations or usual))
        return {**row, "commit": machine.commit(Path(__file__).parent)}
    except ImportError:
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
        "guarded": fold.get("guarded"),
    }
    cells |= {name: row.get(name, {}).get("outcome") for name in ("recalibrate", "export_onnx")}
    return cells | {"commit": row.get("commit")}


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Outcomes of each operation, what was reached, and the reasons for the rest."""
    ran = [row for row in rows if "skipped" not in row]
    several = f"{len(ran)} of the {len(everything())} of the list, and {len(rows) - len(ran)} left out"
    summary: dict[str, Any] = {"models": several}
    for name in (*OPERATIONS, "export_onnx"):
        outcomes = Counter(row[name]["outcome"] for row in ran if name in row)
        if outcomes:
            summary[name] = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    norms = sum(row["norms"] for row in ran)
    activations = sum(row["activations"] for row in ran)
    for name in ("convert", "convert with example"):
        if not any(name in row for row in ran):
            continue
        ours = sum(row.get(name, {}).get("ours", 0) for row in ran)
        fused = sum(row.get(name, {}).get("fused", 0) for row in ran)
        summary[f"{name}, reached"] = (
            f"{ours} of {norms} batch norms ours ({100 * ours / max(norms, 1):.1f} %), "
            f"{fused} of {activations} activations behind them fused "
            f"({100 * fused / max(activations, 1):.1f} %)"
        )
        reasons = Counter(why for row in ran for why in row.get(name, {}).get("reasons", {}).values())
        summary[f"{name}, not fused"] = "; ".join(f"{n} {why}" for why, n in reasons.most_common(12))
    if any("fold" in row for row in ran):
        folded = sum(row.get("fold", {}).get("folded", 0) for row in ran)
        guarded = sum(row.get("fold", {}).get("guarded", 0) for row in ran)
        summary["folded"] = f"{folded} of {norms} batch norms, and {guarded} guarded"
    return summary
