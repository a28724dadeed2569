import argparse

import pytest

from gammabeta.bench import suites
from gammabeta.cli.app import run
from gammabeta.errors import UsageError


@pytest.mark.parametrize("name", suites.SUITES)
def test_every_registered_suite_loads_and_declares_its_options(name):
    parser = argparse.ArgumentParser()
    suites.load(name).add_options(parser)
    assert callable(suites.load(name).run)
    assert len(parser.parse_args([]).__dict__) > 0


def test_no_suite_lists_all_of_them(capsys):
    assert suites.main([], "bench") == 0
    printed = capsys.readouterr().out
    for name, about in suites.SUITES.items():
        assert f"  {name} " in printed
        assert about in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "unknown suite 'nonsense'"),
        (["training", "--nonsense"], "unrecognized arguments: --nonsense; see `bench training --help`"),
        (["training", "--rounds", "many"], "invalid int value"),
        (["training", "--images", "1000"], "name a folder with --results"),
        (["training", "--only", "abacus", "--list"], "unknown contestant 'abacus'"),
    ],
)
def test_mistakes_are_usage_errors_of_one_line(arguments, message):
    with pytest.raises(UsageError, match=message) as caught:
        suites.main(arguments, "bench")
    assert "\n" not in str(caught.value)


def test_the_command_passes_everything_after_the_suite_on(capsys):
    assert run(["bench", "training", "--list"]) == 0
    assert "gammabeta-bf16" in capsys.readouterr().out
    assert run(["bench", "training", "--nonsense"]) == 2
    assert "gammabeta bench training --help" in capsys.readouterr().err


def test_help_after_the_command_is_the_list_of_suites(capsys):
    assert run(["bench", "--help"]) == 0
    assert "Suites:" in capsys.readouterr().out
