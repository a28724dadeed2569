"""``benchmarks/compare.py``: its arithmetic, its refusals, and this checkout compared with itself."""

import json
import sys

import pytest

from benchmarks import compare
from benchmarks.compare import Pair
from benchmarks.harness import IncorrectError
from gammabeta.errors import UnavailableError

PAIRS = [
    Pair(old={"a": 2.0, "b": 3.0}, new={"a": 1.0, "b": 6.0}),
    Pair(old={"a": 8.0, "b": 9.0}, new={"a": 1.0, "b": 9.0}),
    Pair(old={"a": 4.0, "b": 4.0}, new={"a": 2.0, "b": 1.0}),
]


def test_ratios_are_old_by_new_round_by_round():
    assert compare.ratios(PAIRS) == {"a": [2, 8, 2], "b": [0.5, 1, 4]}
    assert compare.means(PAIRS) == pytest.approx([1, 8**0.5, 8**0.5])


def test_the_summary_takes_the_median_round_of_each_case():
    assert compare.summary(PAIRS) == (
        "old / new: geometric mean 1.414 (single rounds 1.000 to 2.828), least 1.000 (b), greatest 2.000 (a)"
    )
    first, second = compare.rows("small", PAIRS)
    assert (first["case"], first["old"], first["new"]) == ("a", "4.000 s", "1.000 s")
    assert (second["old / new"], second["single rounds"]) == ("1.000", "0.500 to 4.000")


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.500 s"), (0.0123456, "12.35 ms"), (4.56789e-5, "45.68 µs")]
)
def test_a_time_has_a_unit(seconds, text):
    assert compare._time(seconds) == text


def test_wrong_results_stop_the_comparison_and_rounding_does_not():
    old = {"a": [100.0, 1e-9], "b": [5.0]}
    assert compare.same_results(old, {"a": [100.01, 3e-8], "b": [5.0]}) == 1
    assert compare.same_results(old, old) == 2
    with pytest.raises(IncorrectError, match=r"b: a sum over a result is 5\.1, on the other checkout 5"):
        compare.same_results(old, {"a": [100.0, 1e-9], "b": [5.1]})
    with pytest.raises(IncorrectError, match="a: a sum over a result is nan"):
        compare.same_results(old, {"a": [float("nan"), 1e-9], "b": [5.0]})


def test_a_checkout_compared_with_itself(monkeypatch, tmp_path, capsys):
    """One round of the quickest suite, as a user runs it but for the rounds within a process."""
    monkeypatch.setattr(compare, "INNER_ROUNDS", {"small": 1})
    options = ["--suite", "small", "--rounds", "1", "--threads", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["compare.py", str(compare.ROOT), *options])
    assert compare.main() == 0
    assert "small, results: 8 of 8 cases equal to the bit" in capsys.readouterr().out
    (page,) = tmp_path.glob("compare-*.md")
    assert "| small | BatchNorm1d, 64×128, training |" in page.read_text("utf-8")
    (measured,) = json.loads(page.with_suffix(".json").read_text("utf-8"))["measured"]
    assert measured["suite"] == "small"
    assert measured["old"].keys() == measured["new"].keys()


def test_what_is_no_checkout_is_refused_in_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path)])
    assert compare.main() == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: give a checkout of gammabeta")
    assert printed.count("\n") == 1


def test_another_package_than_the_checkouts_is_noticed(tmp_path):
    """An installed package must not stand in for a checkout that has none."""
    with pytest.raises(UnavailableError, match="was to use the package of"):
        compare.run_cases("small", 0, tmp_path, {})
