"""The corpus: every report has a case, the halves are as they were drawn, and cases show their symptoms."""

import random

import pytest

from benchmarks.corpus import cases  # noqa: F401 -- registers them
from benchmarks.corpus.harness import CASES, sources
from benchmarks.suites.corpus import interval, summarise
from gammabeta.doctor import diagnose
from gammabeta.doctor.checks import CHECKS


def test_every_report_has_a_case_and_codes_that_exist():
    assert set(CASES) == set(sources())
    assert len(CASES) >= 60
    assert {code for source in sources().values() for code in source.expect} <= set(CHECKS)
    addresses = [source.url for source in sources().values()]
    assert len(set(addresses)) == len(addresses)


def test_the_halves_are_as_they_were_drawn():
    names = sorted(sources())
    random.Random(20261127).shuffle(names)
    assert {name for name, source in sources().items() if source.half == "work"} == set(
        names[: len(names) // 2]
    )


def test_a_case_of_the_work_half():
    made = CASES["pifpaf-order"]()
    report = diagnose(made.model, made.loader, loss=made.loss)
    assert [finding.check for finding in report.at_least("warning")] == ["non-iid-batches"]
    assert report.in_short.startswith("In short: data in order of class")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_each_case_shows_its_symptom(name):
    CASES[name]()


def test_recall_and_precision_by_cause_and_by_code():
    def row(kind, expected, said):
        right = not said if expected == "nothing" else bool(set(said.split(", ")) & {expected})
        return {"kind": kind, "expected": expected, "said": said, "right": right, "failed": ""}

    rows = [
        row("frozen", "partly-frozen", "partly-frozen, eps"),
        row("frozen", "partly-frozen", ""),
        row("elsewhere", "nothing", "eps"),
        row("elsewhere", "nothing", ""),
    ]
    found = {key: value.split(";")[0] for key, value in summarise(rows).items()}
    assert found["recall"] == found["recall, frozen"] == "0.50 (1 of 2"
    assert found["precision"] == "0.50 (1 of 2"
    assert found["precision, frozen"] == found["said and expected, partly-frozen"] == "1.00 (1 of 1"
    assert found["recall, elsewhere"] == "none"
    assert found["precision, elsewhere"] == "0.00 (0 of 1"
    assert found["said and expected, eps"] == "0.00 (0 of 2"


def test_interval_by_wilson():
    assert interval(8, 10) == "0.80 (8 of 10; 0.49 to 0.94)"
    assert interval(0, 2) == "0.00 (0 of 2; 0.00 to 0.66)"
    assert interval(0, 0) == "none"
