"""``benchmarks/run.py``: the registry of suites, the command line, what is written."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import suites
from benchmarks.harness import Result
from benchmarks.run import main, parse, run
from gammabeta.errors import UsageError

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "run.py"


@pytest.mark.parametrize("name", suites.SUITES)
def test_every_registered_suite_loads_and_takes_its_options(name, tmp_path):
    options = parse(name, ["--quick", "--out", str(tmp_path)])
    assert (options.quick, options.out) == (True, tmp_path)
    assert callable(suites.load(name).run)


def test_no_suite_lists_all_of_them(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in suites.SUITES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "there is no benchmark 'nonsense'"),
        (
            ["training", "--nonsense"],
            "unrecognized arguments: --nonsense; see `python benchmarks/run.py training --help`",
        ),
        (["training", "--rounds", "many"], "invalid int value"),
        (["training", "--only", "abacus"], "unknown contestant 'abacus'"),
        (["--quick", "training"], "name a suite before --quick"),
    ],
)
def test_mistakes_are_usage_errors_of_one_line(arguments, message):
    with pytest.raises(UsageError, match=message) as caught:
        run(arguments)
    assert "\n" not in str(caught.value)


def test_the_program_prints_a_mistake_in_one_line_and_takes_the_suites_own_options(tmp_path):
    """As a process of its own, from another folder: it must find its modules by itself."""

    def call(*arguments):
        return subprocess.run(
            [sys.executable, PROGRAM, *arguments], cwd=tmp_path, capture_output=True, text=True
        )

    assert "--peers-dir" in call("training", "--help").stdout
    wrong = call("training", "--nonsense")
    assert wrong.returncode == 2
    assert wrong.stderr == (
        "error: unrecognized arguments: --nonsense; see `python benchmarks/run.py training --help`\n"
    )


def test_help_without_a_suite_is_the_list_of_suites(capsys):
    assert main(["--help"]) == 0
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
    assert main(["tally", "--out", str(tmp_path)]) == 0
    suffixes = sorted(path.suffix for path in tmp_path.iterdir())
    assert suffixes == [".json", ".md", ".svg"]
    assert "sum: 2" in capsys.readouterr().out
    (page,) = tmp_path.glob("tally-*.md")
    assert "| a | 2 |" in page.read_text("utf-8")


def test_a_long_run_puts_down_what_it_has(tally, tmp_path):
    options = parse("tally", ["--out", str(tmp_path)])
    options.save(Result("Tally", [], {"sum": 1}))
    (page,) = tmp_path.glob("tally-*.md")
    assert "sum: 1" in page.read_text("utf-8")


def test_a_quick_run_never_takes_the_place_of_a_result(tally, tmp_path):
    main(["tally", "--out", str(tmp_path)])
    main(["tally", "--quick", "--out", str(tmp_path)])
    assert len(list(tmp_path.glob("tally-quick-*"))) == 3
    assert len(list(tmp_path.iterdir())) == 6


def test_a_part_of_a_suite_has_files_of_its_own(tally, tmp_path):
    options = parse("tally", ["--out", str(tmp_path)])
    options.save(Result("Tally", [], part="half"))
    assert len(list(tmp_path.glob("tally-half-*"))) == 2
