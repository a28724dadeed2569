"""``python benchmarks/run.py SUITE... [OPTIONS]``: run benchmark suites and write their results."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import RESULTS, Options, report
from benchmarks.suites import SUITES, load
from gammabeta.errors import GammabetaError, UsageError

PROGRAM = "python benchmarks/run.py"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are ours: one line, no usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def main(arguments: Sequence[str]) -> int:
    """Run the suites that come first in the arguments, with the options that follow; return an exit code.

    A mistake in the arguments, and whatever else is an error of ours, is one line on standard error.
    """
    try:
        run(arguments)
    except GammabetaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def run(arguments: Sequence[str]) -> None:
    """Run the suites, write their results and print their summaries.

    Raises:
        UsageError: A suite or an option is unknown.
    """
    names = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    rest = arguments[len(names) :]
    if not names:
        if rest and rest[0] not in ("-h", "--help"):
            raise UsageError(f"name a suite before {rest[0]}: {', '.join(SUITES)}")
        print(_usage())
        return
    for name, options in [(name, parse(name, rest)) for name in names]:
        result = load(name).run(options)
        for path in report.write(report.stem_of(name, options.quick), result, options.out):
            print(path)
        for key, value in result.summary.items():
            print(f"{key}: {value}")


def parse(name: str, arguments: Sequence[str]) -> Options:
    """Return a suite's options.

    Raises:
        UsageError: The suite or an option is unknown.
    """
    suite = load(name)
    parser = _Parser(f"{PROGRAM} {name}", description=suite.__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds; not for reporting")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results go; %(default)s")
    if hasattr(suite, "add_options"):
        suite.add_options(parser)
    given = parser.parse_args(arguments)
    save = partial(report.write, report.stem_of(name, given.quick), folder=given.out)
    return Options(given.quick, given.out, given, save)


def _usage() -> str:
    suites = "\n".join(f"  {name:<10} {what}" for name, what in SUITES.items())
    return (
        f"Usage: {PROGRAM} SUITE... [--quick] [--out FOLDER] [OPTIONS]\n\nSuites:\n{suites}\n\n"
        f"The options of one: {PROGRAM} SUITE --help"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
