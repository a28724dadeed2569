"""All commands together, the command ``info``, and how errors end a command.

Exit codes: 0 done; 1 the doctor found something, or a bug of ours (with its traceback); 2 the user can mend
it (one line says how); 130, 143 and 129
interrupted by Ctrl-C, SIGTERM and a closed terminal.
"""

import errno
import sys
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import GammabetaError, out_of_memory
from .bench import bench
from .doctor import doctor, recalibrate
from .evaluate import compare, evaluate, report
from .fold import export, fold
from .lab import lab
from .output import Json, console, fail, notes, prepare_streams, print_json, to_nowhere
from .predict import predict
from .rate import find_rate
from .reproduce import reproduce
from .train import train

# Some releases of typer bring their own copy of click; this is the base of all usage errors in either.
_ClickError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


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


app = typer.Typer(
    name="gammabeta",
    help="Batch normalization that is fast, correct and visible.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    train,
    find_rate,
    evaluate,
    predict,
    compare,
    report,
    doctor,
    recalibrate,
    fold,
    export,
    reproduce,
    bench,
    lab,
    info,
):
    app.command()(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gammabeta {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Batch normalization that is fast, correct and visible."""


def run(arguments: list[str] | None = None) -> int:
    """Run a command line; print a user's error as one line and return the exit code."""
    prepare_streams()
    try:
        with notes():
            code = app(args=arguments, standalone_mode=False)
        sys.stdout.flush()
    except _ClickError as error:
        return _usage_error(error)
    except (KeyboardInterrupt, typer.Abort):
        return fail("interrupted", 130)
    except (BrokenPipeError, SystemExit) as error:  # click and rich turn the one into the other
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        to_nowhere(sys.stdout)  # the reader of our output, `head` say, has gone
        return 0
    except Exception as error:
        if isinstance(error, GammabetaError):
            return fail(out_of_memory(error) or str(error), error.exit_code)
        if told := out_of_memory(error):
            return fail(told, 2)
        if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
            to_nowhere(sys.stdout)
            return fail(f"the output cannot be written: {error.strerror}", 2)
        raise
    return code if isinstance(code, int) else 0


def _usage_error(error: Any) -> int:
    message = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    if context is None or not message:  # the help text, asked for by giving no arguments
        error.show()
        return int(error.exit_code)
    see = "? See" if message.endswith("?") else "; see"  # after "Did you mean 'doctor'?"
    return fail(f"{message.rstrip('?')}{see} `{context.command_path} --help`", 2)
