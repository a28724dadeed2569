"""Verdicts on made-up measurements: each criterion holds on one side of its line and fails on the other."""

import math

import pytest

from gammabeta.errors import UsageError
from gammabeta.studies import CATALOG, find
from gammabeta.studies.study import Criterion, Measured, Results, judge

#: For each study numbers of which every criterion holds, and for each criterion what makes it alone fail.
CASES: dict[str, tuple[dict[str, float], list[dict[str, float]]]] = {
    "gradient-explosion": (
        {"relu": 1.46, "linear": 1.004, "theory": 1.004},
        [{"relu": 1.40}, {"linear": 1.02}],
    ),
    "faster": (
        {
            "ahead": 95.0,
            "final_with": 97.0,
            "final_without": 95.0,
            "moved_with": 2.0,
            "moved_without": 4.0,
            "steps_with_1": 2000.0,
            "steps_with_5": 600.0,
            "steps_with_30": 900.0,
        },
        [{"final_with": 94.0}, {"moved_with": 3.0}, {"steps_with_5": 1500.0}, {"steps_with_30": math.inf}],
    ),
    "larger-steps": (
        {
            "ratio_deep": 1000.0,
            "ratio_least": 3.0,
            "ratio_shallow": 3.0,
            "growth_with": 4.0,
            "growth_without": 300.0,
        },
        [{"ratio_least": 0.3}, {"ratio_shallow": 500.0}, {"growth_with": 200.0}],
    ),
    "landscape": (
        {
            "range_with": 0.2,
            "range_without": 1.0,
            "change_with": 0.5,
            "change_without": 3.0,
            "moves_with": 0.1,
            "moves_without": 0.2,
            "moves_noisy": 0.5,
            "steps_with": 60.0,
            "steps_without": 150.0,
            "steps_noisy": 80.0,
        },
        [{"range_with": 0.6}, {"change_with": 2.0}, {"moves_noisy": 0.15}, {"steps_noisy": 100.0}],
    ),
    "ghost-batches": (
        {"small": 97.0, "large": 95.5, "ghost": 96.5, "longer": 97.3},
        [{"large": 96.9}, {"ghost": 95.0}, {"longer": 96.5}],
    ),
    "evaluation-statistics": (
        {
            "lag": 2.0,
            "samples_16": 18.0,
            "samples_1024": 14.1,
            "samples_4096": 14.0,
            "gap_2": 6.0,
            "gap_1024": 0.1,
            "frozen": 20.0,
            "thawed": 25.0,
        },
        [{"lag": 0.1}, {"samples_1024": 15.0}, {"gap_1024": 1.0}, {"frozen": 26.0}],
    ),
    "domains": (
        {
            "own": 97.0,
            "shared": 60.0,
            "fewer": 30.0,
            "mean_0": 55.0,
            "mean_1": 60.0,
            "alone_1": 40.0,
            "mean_8": 70.0,
            "alone_8": 65.0,
        },
        [{"shared": 95.0}, {"fewer": 5.0}, {"mean_8": 60.0}, {"mean_1": 50.0}],
    ),
    "dropout-before": (
        {
            "none": 88.0,
            "after": 88.0,
            "before": 70.0,
            "repaired": 80.0,
            "apart": 0.01,
            "least": 0.5,
            "furthest_none": 0.02,
            "furthest_after": 0.03,
            "found_before": 3.0,
            "found_first": 1.0,
            "found_after": 0.0,
            "found_none": 0.0,
        },
        [
            {"repaired": 70.5},
            {"after": 80.0},
            {"apart": 0.1},
            {"furthest_after": 0.2},
            {"found_first": 0.0},
        ],
    ),
    "batches-of-two": (
        {"gain_2": 1.0, "gain_64": 0.1, "group": 87.0, "running_2": 84.0},
        [{"gain_2": 0.15}, {"group": 80.0}, {"gain_64": 2.0}],
    ),
    "repair": (
        {
            "barrier_before": 30.0,
            "barrier_after": 3.0,
            "barrier_unmatched": 40.0,
            "reduction": 90.0,
            "collapse": 0.4,
            "same": 0.0,
        },
        [{"reduction": 40.0}, {"collapse": 0.9}, {"barrier_unmatched": 5.0}, {"same": 1.0}],
    ),
    "regularization": (
        {
            "loss_16": 0.2,
            "loss_64": 0.25,
            "loss_256": 0.3,
            "loss_population": 0.4,
            "alone_16": 0.8,
            "alone_64": 0.9,
            "alone_256": 1.0,
            "alone_population": 1.1,
            "share": 70.0,
        },
        [{"loss_64": 0.5}, {"alone_64": 1.05}, {"share": 20.0}],
    ),
    "weight-decay": (
        {
            "difference": 1e-9,
            "norm_scheduled": 9.0,
            "norm_decay": 3.0,
            "gradient": 0.5,
            "spread": 1.05,
            "stronger": 2.0,
        },
        [{"difference": 0.1}, {"gradient": 1.0}, {"spread": 3.0}, {"stronger": 4.0}],
    ),
}


@pytest.mark.parametrize("name", CATALOG)
def test_criteria_of_made_up_numbers(name: str) -> None:
    study, (good, failing) = find(name), CASES[name]
    verdict, judged = judge(study.criteria, Results([Measured(good)]))
    assert verdict == "reproduced", [each.says for each in judged if not each.holds]
    assert len(failing) == len(study.criteria)
    for place, change in enumerate(failing):
        verdict, judged = judge(study.criteria, Results([Measured(good | change)]))
        assert not judged[place].holds, f"{name}: {judged[place].says} with {change}"
        assert verdict != "reproduced"


@pytest.mark.parametrize("name", CATALOG)
def test_what_a_study_says_of_itself(name: str) -> None:
    study = find(name)
    assert study.name == name
    for words in (
        study.title,
        study.claim,
        study.paper,
        study.where,
        study.method,
        study.differs,
        study.tool,
    ):
        assert words.strip() == words
        assert words
    assert type(study.quick) is type(study.setting)
    assert study.quick != study.setting


HALF = tuple(Criterion(name, lambda n, name=name: n[name] > 0) for name in "abc")


@pytest.mark.parametrize(
    ("numbers", "verdict"),
    [
        ({"a": 1, "b": 1, "c": 1}, "reproduced"),
        ({"a": 1, "b": 0, "c": 0}, "partly"),
        ({"a": 0, "b": 1, "c": 1}, "partly"),
        ({"a": 0, "b": 1, "c": 0}, "not reproduced"),
        ({"a": float("nan"), "b": 1, "c": 0}, "not reproduced"),
    ],
)
def test_verdict(numbers: dict[str, float], verdict: str) -> None:
    assert judge(HALF, Results([Measured(numbers)]))[0] == verdict


def test_a_criterion_needs_the_mean_and_most_seeds() -> None:
    one = HALF[:1]
    mean_alone = [Measured({"a": value}) for value in (9.0, -1.0, -1.0)]
    seeds_alone = [Measured({"a": value}) for value in (1.0, 1.0, -9.0)]
    both = [Measured({"a": value}) for value in (1.0, 1.0, -1.0)]
    assert [judge(one, Results(seeds))[1][0].holds for seeds in (mean_alone, seeds_alone, both)] == [
        False,
        False,
        True,
    ]


def test_spread() -> None:
    spread = Results([Measured({"a": value}) for value in (1.0, 2.0, 3.0)]).spread("a")
    assert spread.mean == 2
    assert spread.deviation == 1
    assert spread.half_width == pytest.approx(4.303 / 3**0.5)


def test_an_unknown_study() -> None:
    with pytest.raises(UsageError, match="no study 'faste': the names are "):
        find("faste")
