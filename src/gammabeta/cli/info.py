"""``gammabeta info``: versions, device, threads, instruction sets."""

from .output import Json, console, print_json


def info(json: Json = False) -> None:
    """Show versions, processor, threads, instruction set and GPUs: what to put into a bug report."""
    from ..train.provenance import commit, machine, versions

    document = {"versions": versions(), "commit": commit(), "machine": machine()}
    if json:
        print_json(document)
        return
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, number in versions().items():
        table.add_row(name, number)
    table.add_section()
    for name, value in machine().items():
        text = ", ".join(value) or "none" if isinstance(value, list) else _words(value)
        table.add_row(name.replace("_", " "), text)
    console().print(table)


def _words(value: object) -> str:
    return (
        {True: "yes", False: "no", None: "unknown"}.get(value, str(value))
        if not isinstance(value, int | float) or (isinstance(value, bool))
        else str(value)
    )
