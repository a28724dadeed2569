"""The commands put together, and what becomes of errors.

Exit codes: 0 done; 1 the doctor found something; 2 the user can mend it (one line says how); 70 a bug of
ours (with its traceback); 130 and 143 interrupted by Ctrl-C and SIGTERM.
"""

import os
import sys
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import GammabetaError
from .compare import compare
from .doctor import doctor
from .evaluate import evaluate
from .export import export
from .fold import fold
from .info import info
from .output import fail
from .predict import predict
from .recalibrate import recalibrate
from .train import train

# Some releases of typer bring their own copy of click; this is the base of all usage errors in either.
_ClickError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    name="gammabeta",
    help="Batch normalization that is fast, correct and visible.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (train, evaluate, predict, compare, doctor, recalibrate, fold, export, info):
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
    try:
        code = app(args=arguments, standalone_mode=False)
    except GammabetaError as error:
        return fail(str(error), error.exit_code)
    except _ClickError as error:
        return _usage_error(error)
    except (KeyboardInterrupt, typer.Abort):
        return fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output, `head` say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code if isinstance(code, int) else 0


def _usage_error(error: Any) -> int:
    message = error.format_message().rstrip(".?")
    context = getattr(error, "ctx", None)
    if context is None or not message:  # the help text, asked for by giving no arguments
        error.show()
        return int(error.exit_code)
    return fail(f"{message}; see `{context.command_path} --help`", 2)
