"""The fault bench: every fault is caught, and nothing cries wolf."""

import pytest

from benchmarks.faults.bench import BEGIN, END, distributed_trials, failures, table, trials
from benchmarks.harness.report import write_between

SMALL = ("mlp",)


def test_one_seed_of_one_kind():
    results = list(trials(seed=0, only=SMALL))
    assert failures(results) == []
    assert {trial.subject for trial in results if trial.fault is None} == set(SMALL)
    assert len(results) > 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_every_kind(seed):
    results = [*trials(seed), *distributed_trials(seed)]
    assert failures(results) == []


def test_the_table_counts_what_was_missed(tmp_path):
    results = list(trials(seed=0, only=("mlp",)))[:3]
    healthy, ill = results[0], results[1]
    silent = type(ill)(ill.seed, ill.subject, ill.fault, frozenset({("eps", "error")}))
    text = table([healthy, silent])
    assert "| `never-updated` | 1 | 0 | 0.000 | 0 | – |" in text
    assert "| `eps` | 0 | 0 | – | 1 | 0.000 |" in text
    assert len(failures([silent])) == 2
    page = tmp_path / "page.md"
    page.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n", encoding="utf-8")
    write_between(page, BEGIN, END, text)
    assert page.read_text(encoding="utf-8") == f"above\n{BEGIN}\n{text}\n{END}\nbelow\n"
