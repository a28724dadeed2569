"""The command line of the suites, shared by ``gammabeta bench`` and ``benchmarks/run.py``."""

import argparse
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import NoReturn

from gammabeta.errors import UsageError

from . import CHECKOUT, SUITES, Options, load, report


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are ours: one line, no usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def main(arguments: Sequence[str], program: str) -> int:
    """Run the suites that come first in the arguments, with the options that follow; return an exit code.

    Raises:
        UsageError: A suite or an option is unknown.
    """
    names = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    rest = arguments[len(names) :]
    if not names:
        if rest and rest[0] not in ("-h", "--help"):
            raise UsageError(f"name a suite before {rest[0]}: {', '.join(SUITES)}")
        print(_usage(program))
        return 0
    for name, options in [(name, parse(name, rest, program)) for name in names]:
        result = load(name).run(options)
        for path in report.write(report.stem_of(name, options.quick), result, options.out):
            print(path)
        for key, value in result.summary.items():
            print(f"{key}: {value}")
    return 0


def _usage(program: str) -> str:
    suites = "\n".join(f"  {name:<10} {what}" for name, what in SUITES.items())
    return (
        f"Usage: {program} SUITE... [--quick] [--out FOLDER] [OPTIONS]\n\nSuites:\n{suites}\n\n"
        f"The options of one: {program} SUITE --help"
    )


def parse(name: str, arguments: Sequence[str], program: str) -> Options:
    """Return a suite's options.

    Raises:
        UsageError: The suite or an option is unknown.
    """
    suite = load(name)
    parser = _Parser(f"{program} {name}", description=suite.__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds; not for reporting")
    parser.add_argument("--out", type=Path, default=default_folder(), help="where results go; %(default)s")
    if hasattr(suite, "add_options"):
        suite.add_options(parser)
    given = parser.parse_args(arguments)
    save = partial(report.write, report.stem_of(name, given.quick), folder=given.out)
    return Options(given.quick, given.out, given, save)


def default_folder() -> Path:
    """Return where results go: ``benchmarks/results`` of the checkout, else a folder here."""
    return CHECKOUT / "results" if CHECKOUT.is_dir() else Path("gammabeta-bench")
