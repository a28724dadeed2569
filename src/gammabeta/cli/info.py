"""``gammabeta info``: versions, device, threads, instruction sets."""

from typing import Any

from .output import Json, console, print_json


def info(json: Json = False) -> None:
    """Show versions, processor, threads, instruction set and GPUs: what to put into a bug report."""
    from ..train.provenance import commit, machine, versions

    document: dict[str, Any] = {"versions": versions(), "commit": commit(), "machine": machine()}
    if json:
        print_json(document)
        return
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, number in document["versions"].items():
        table.add_row(name, number)
    table.add_row("commit", document["commit"] or "not a checkout")
    for name, value in document["machine"].items():
        table.add_row(name.replace("_", " "), _words(value))
    console().print(table)


def _words(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "unknown" if value is None else str(value)
