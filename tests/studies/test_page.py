"""The page in the docs says what the results say, and the results' verdicts are those of today's criteria."""

from pathlib import Path

import pytest

from gammabeta.studies import CATALOG, find
from gammabeta.studies.conduct import results_of
from gammabeta.studies.report import read
from gammabeta.studies.study import judge
from scripts.studies_page import PAGE, PICTURES, RESULTS, page


def test_the_page_is_written_from_the_results() -> None:
    assert PAGE.read_text("utf-8") == page(RESULTS)


@pytest.mark.parametrize("name", CATALOG)
def test_a_result_is_full_sized_and_judged_by_the_criteria_as_they_are(name: str) -> None:
    document = read(RESULTS, name)
    if document is None:
        pytest.skip("not measured yet")
    study = find(name)
    assert not document["quick"]
    assert len(document["seeds"]) >= 3
    verdict, judged = judge(study.criteria, results_of(document))
    assert verdict == document["verdict"]
    assert [each.says for each in judged] == [each["says"] for each in document["criteria"]]
    if verdict != "reproduced":
        assert study.believed, "say why, as you believe"
    for look in ("light", "dark"):
        assert 0 < (PICTURES / f"{name}-{look}.svg").stat().st_size < 60_000


def test_every_file_of_results_is_a_study() -> None:
    assert {Path(path).stem for path in RESULTS.glob("*.json")} <= set(CATALOG)
