"""Other people's faults: what the doctor and the guard say of public reports, each rebuilt as a small case.

``--half work`` is what checks are improved on; ``--half sealed`` is run once, at the end. ``--tool`` asks
another tool instead. ``--symptoms`` only shows that each case has what was reported, and asks none.
"""

import argparse
import math
import time
import traceback
import warnings
from collections import Counter
from typing import Any

import torch

from gammabeta.doctor import diagnose
from gammabeta.errors import UnavailableError

from ..corpus import cases  # noqa: F401 -- registers the cases
from ..corpus.harness import CASES, Case, Source, sources
from ..corpus.others import OTHERS
from ..harness import IncorrectError, Options, Result

Z = 1.959964  # of a two-sided interval of 95 %


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which half, which cases, and whether to diagnose."""
    parser.add_argument("--half", choices=("work", "sealed"), default="work", help="%(default)s")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="some cases by name")
    parser.add_argument("--tool", choices=("doctor", *OTHERS), default="doctor", help="%(default)s")
    parser.add_argument("--symptoms", action="store_true", help="do not diagnose")


def run(options: Options) -> Result:
    """Make every case, ask the doctor and the guard, judge."""
    given, rows = options.given, []
    if missing := sorted(set(sources()) ^ set(CASES)):
        raise IncorrectError(f"without a case or a source: {', '.join(missing)}")
    for source in sources().values():
        wanted = source.name in given.only if given.only else source.half == given.half
        if wanted:
            rows.append(_row(source, given.tool, asked=not given.symptoms))
            if options.quick or given.only:
                print(rows[-1], flush=True)
    trial = "-trial" if given.only or given.symptoms else ""
    summary = {} if given.symptoms else summarise(rows)
    tool = "" if given.tool == "doctor" else f"-{given.tool}"
    return Result(f"The corpus, {given.half} half", rows, summary, part=given.half + tool + trial)


def _row(source: Source, tool: str, *, asked: bool) -> dict[str, Any]:
    began, said, what = time.process_time(), [], ""
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case = CASES[source.name]()
            made = time.process_time() - began
            said = OTHERS.get(tool, _said)(case) if asked else []
    except UnavailableError:
        raise
    except Exception as error:
        made = time.process_time() - began
        what = f"{type(error).__name__}: {error}; {traceback.format_exc().splitlines()[-3].strip()}"[:200]
    # Another tool has other words: any word of a fault counts for it.
    hit = bool(set(said) & set(source.expect) or (said and tool in OTHERS)) if source.expect else not said
    return {
        "case": source.name,
        "kind": source.kind,
        "expected": ", ".join(source.expect) or "nothing",
        "said": ", ".join(said),
        "right": hit if asked and not what else "",
        "failed": what,
        "seconds": round(made, 1),
    }


def _said(case: Case) -> list[str]:
    """The codes of errors and warnings, of both tools."""
    extra = {"optimizer": case.optimizer, "source": case.source}
    report = diagnose(case.model, case.loader, loss=case.loss, **extra)
    codes = {finding.check for finding in report.at_least("warning")}
    return sorted(codes | {noticed.finding.check for noticed in case.noticed})


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Recall and precision with Wilson's intervals: over all, by the reports' causes, by what was said."""
    good = [row for row in rows if not row["failed"]]
    found: dict[str, Any] = {"cases": f"{len(good)} of {len(rows)} show their symptom"}
    found |= _of(good, "")
    for kind in sorted({row["kind"] for row in good}):
        found |= _of([row for row in good if row["kind"] == kind], f", {kind}")
    said = Counter(code for row in good for code in _codes(row["said"]))
    meant = Counter(code for row in good for code in _codes(row["said"]) & _codes(row["expected"]))
    of_code = {f"said and expected, {code}": interval(meant[code], said[code]) for code in sorted(said)}
    return found | of_code


def _of(rows: list[dict[str, Any]], name: str) -> dict[str, str]:
    """Recall over reports with a fault of batch norm's, precision over those of which anything was said."""
    faults = [row for row in rows if row["expected"] != "nothing"]
    spoken = [row for row in rows if row["said"]]
    recall = interval(sum(row["right"] for row in faults), len(faults))
    return {
        f"recall{name}": recall,
        f"precision{name}": interval(sum(row["right"] for row in spoken), len(spoken)),
    }


def _codes(cell: str) -> set[str]:
    return set(cell.split(", ")) if cell else set()


def interval(hits: int, of: int) -> str:
    """A share with its 95 % interval by Wilson (1927)."""
    if not of:
        return "none"
    share, spread = hits / of, Z * Z / of
    middle = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / of + spread / (4 * of))
    return f"{share:.2f} ({hits} of {of}; {max(middle - half, 0):.2f} to {min(middle + half, 1):.2f})"
