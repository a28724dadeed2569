"""The registry and the command line of the suites."""

import sys

import pytest

from benchmarks import suites
from benchmarks.suites import Result, command
from gammabeta.cli.app import run
from gammabeta.errors import UsageError


@pytest.mark.parametrize("name", suites.SUITES)
def test_every_registered_suite_loads_and_takes_its_options(name, tmp_path):
    options = command.parse(name, ["--quick", "--out", str(tmp_path)], "bench")
    assert (options.quick, options.out) == (True, tmp_path)
    assert callable(suites.load(name).run)


def test_no_suite_lists_all_of_them(capsys):
    assert command.main([], "bench") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in suites.SUITES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "there is no benchmark 'nonsense'"),
        (["training", "--nonsense"], "unrecognized arguments: --nonsense; see `bench training --help`"),
        (["training", "--rounds", "many"], "invalid int value"),
        (["training", "--only", "abacus"], "unknown contestant 'abacus'"),
        (["--quick", "training"], "name a suite before --quick"),
    ],
)
def test_mistakes_are_usage_errors_of_one_line(arguments, message):
    with pytest.raises(UsageError, match=message) as caught:
        command.main(arguments, "bench")
    assert "\n" not in str(caught.value)


def test_the_command_passes_everything_after_the_suite_on(capsys):
    with pytest.raises(SystemExit, match="0"):
        run(["bench", "training", "--help"])
    assert "--peers-dir" in capsys.readouterr().out
    assert run(["bench", "training", "--nonsense"]) == 2
    assert "gammabeta bench training --help" in capsys.readouterr().err


def test_help_after_the_command_is_the_list_of_suites(capsys):
    assert run(["bench", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name:<10} {what}" in printed for name, what in suites.SUITES.items())


@pytest.fixture
def tally(monkeypatch):
    """A suite that measures nothing."""

    class Tally:
        __doc__ = "A suite for tests."

        @staticmethod
        def run(options):
            return Result("Tally", [{"case": "a", "times": 2.0}], {"sum": 2}, ["A note."], chart="times")

    monkeypatch.setitem(suites.SUITES, "tally", "nothing")
    monkeypatch.setitem(sys.modules, "benchmarks.suites.tally", Tally)


def test_results_are_written_and_summed_up(tally, tmp_path, capsys):
    assert command.main(["tally", "--out", str(tmp_path)], "bench") == 0
    suffixes = sorted(path.suffix for path in tmp_path.iterdir())
    assert suffixes == [".json", ".md", ".svg"]
    assert "sum: 2" in capsys.readouterr().out
    (page,) = tmp_path.glob("tally-*.md")
    assert "| a | 2 |" in page.read_text("utf-8")


def test_a_long_run_puts_down_what_it_has(tally, tmp_path):
    options = command.parse("tally", ["--out", str(tmp_path)], "bench")
    options.save(Result("Tally", [], {"sum": 1}))
    (page,) = tmp_path.glob("tally-*.md")
    assert "sum: 1" in page.read_text("utf-8")


def test_a_quick_run_never_takes_the_place_of_a_result(tally, tmp_path):
    command.main(["tally", "--out", str(tmp_path)], "bench")
    command.main(["tally", "--quick", "--out", str(tmp_path)], "bench")
    assert len(list(tmp_path.glob("tally-quick-*"))) == 3
    assert len(list(tmp_path.iterdir())) == 6
