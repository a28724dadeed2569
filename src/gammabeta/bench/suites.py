"""The registry of benchmark suites, and the command line that runs one of them.

A suite is a module of this package with two functions: ``add_options(parser)`` declares its options, and
``run(options)`` measures, writes its results and returns an exit code. Only the suite that is run is loaded.
"""

import argparse
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn, Protocol, cast

from ..errors import UsageError

#: Each suite's name, which is also its module's, and one line about it.
SUITES = {
    "training": "the notebook's epoch, beside the frameworks that can train it",
    "scaling": "time per image over data set and batch sizes, memory, cold and warm starts",
}


class Suite(Protocol):
    """What the module of a suite offers."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options of the suite."""

    def run(self, options: argparse.Namespace) -> int:
        """Measure, write the results and return an exit code."""


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are ours: one line, no usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def load(name: str) -> Suite:
    """Import a suite.

    Raises:
        UsageError: No suite has this name.
    """
    if name not in SUITES:
        raise UsageError(f"unknown suite {name!r}: choose {', '.join(SUITES)}")
    return cast(Suite, import_module(f".{name}", __package__))


def main(arguments: Sequence[str], program: str) -> int:
    """Run the suite that the first argument names with the rest as its options; return its exit code.

    Raises:
        UsageError: The suite or an option is unknown.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, SUITES))
        lines = [f"  {name:{width}}  {about}" for name, about in SUITES.items()]
        print("\n".join([f"Usage: {program} SUITE [OPTIONS]", "", "Suites:", *lines]))
        return 0
    suite, name = load(arguments[0]), arguments[0]
    parser = _Parser(f"{program} {name}", description=f"Measure {SUITES[name]}.", allow_abbrev=False)
    suite.add_options(parser)
    return suite.run(parser.parse_args(arguments[1:]))
