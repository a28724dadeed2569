"""Results on disk: rows with the machine they were measured on, as JSON, and tables in Markdown."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import UsageError

Row = dict[str, Any]

#: The folder ``benchmarks`` of the checkout that this package runs from; an installed package has none there.
CHECKOUT = Path(__file__).resolve().parents[3] / "benchmarks"


def default_folder() -> Path:
    """Return where results go: ``benchmarks/results`` of the checkout, else a folder here."""
    return CHECKOUT / "results" if CHECKOUT.is_dir() else Path("gammabeta-bench")


def machine_line(machine: Mapping[str, Any]) -> str:
    """Return the machine in one line, from what ``train.provenance.machine`` says of it."""
    bf16 = " with bf16" if machine["computes_bf16"] else ""
    memory = f", {machine['memory_gib']:.0f} GiB" if machine.get("memory_gib") else ""
    family = f" (family {machine['family']})" if machine.get("family") else ""
    cores = f"{machine['cores']} cores of {machine['processor']}{family}"
    return f"{cores}, {machine['instruction_set']}{bf16}{memory}"


def cpu_family() -> str | None:
    """Return the processor's family number, which tells generations apart where the name does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return None
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("cpu family")]
    return found[0] if found else None


def stamp() -> dict[str, Any]:
    """Return what every result carries: the day, the commit, the machine and the versions."""
    from ..train.provenance import commit, machine, versions

    today = datetime.now(UTC).date().isoformat()
    return {
        "date": today,
        "commit": commit(),
        "machine": {**machine(), "family": cpu_family()},
        "versions": versions(),
    }


def read_rows(path: Path, machine: Mapping[str, Any]) -> list[Row]:
    """Return the rows of an earlier result, to be added to; none if there is no such file.

    Raises:
        UsageError: It was measured on another machine.
    """
    if not path.exists():
        return []
    document = json.loads(path.read_text("utf-8"))
    for field in ("processor", "family", "cores", "memory_gib"):
        if document["machine"].get(field) != machine.get(field):
            raise UsageError(f"{path} was measured on another machine: measure anew without --append")
    rows: list[Row] = document["rows"]
    return rows


def write_json(path: Path, stamped: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write the rows with their stamp."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**stamped, "rows": list(rows)}, indent=1) + "\n", "utf-8")


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are figures and stand to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *body))
