"""Healthy models as their owners have them, own ones and other libraries': no error, no warning.

``benchmarks/run.py healthy`` has the table.
"""

import pytest

from benchmarks.suites.healthy import cases, examine, summarise

pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's code

QUICK = (
    "own pixels with an empty border",
    "own two heads, data for one",
    "own mixed precision, autocast in the loop",
    "own samples as dicts",
    "own batch renormalization",
)


def assert_silent(name: str) -> None:
    row = examine(name)
    if "left out" in row:
        pytest.skip(row["left out"])
    assert row["found"] == []


@pytest.mark.parametrize("name", QUICK)
def test_healthy(name):
    assert_silent(name)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in cases() if name not in QUICK])
def test_every_healthy_model(name):
    assert_silent(name)


def test_the_list_is_long():
    names = cases()
    assert len(names) == len(set(names)) >= 110
    assert sum(name.startswith("own ") for name in names) >= 50
    assert len(cases(corpus=True)) >= len(names) + 90


def test_what_is_found_is_counted():
    rows = [
        {"case": "own a", "found": []},
        {"case": "own b", "found": [["eps", "error", "eps is 0"], ["eps", "error", "eps is 0"]]},
        {"case": "timm c", "found": []},
    ]
    assert summarise(rows) == {
        "own": "1 of 2 without error or warning",
        "timm": "1 of 1 without error or warning",
        "all": "2 of 3",
        "models with eps": 1,
    }
