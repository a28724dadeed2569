"""The suite scaling: its cases, the data set repeated, the sentence about flatness."""

import numpy as np
import pytest

from benchmarks.harness import command
from benchmarks.harness.digits import mnist_of
from benchmarks.suites import scaling, scaling_report
from gammabeta.data import load


def cases_in(folder, sizes=scaling.SIZES):
    return list(scaling.make_cases(folder, sizes, scaling.BATCHES, "fp32", 60))


@pytest.fixture
def asked(monkeypatch):
    """The command lines and variables that the cases would run."""
    seen = []

    def train(arguments, timeout, variables):
        seen.append((list(arguments), dict(variables)))
        seconds = {"train": 2.0, "first_step": 0.5, "evaluate": 0.5}
        result = {"seconds": seconds, "images": 1000, "steps": 16, "precision": "fp32", "test_accuracy": 0.9}
        return command.Run(result, 4.0, 600.0)

    monkeypatch.setattr(command, "train", train)
    return seen


def test_the_cases_cover_the_sizes_and_batches_that_are_promised(tmp_path):
    cases = cases_in(tmp_path)
    assert [c.images for c in cases if c.part == "sizes"] == [6_000, 60_000, 600_000]
    assert [c.batch for c in cases if c.part == "batches"] == [32, 64, 128, 256, 512, 1024]
    assert [c.name for c in cases if c.part == "starts"] == ["first run", "later run"]


def test_each_case_asks_for_what_it_names(tmp_path, asked):
    rows = [scaling.measure(case, 1) for case in cases_in(tmp_path, sizes=[2000])]
    cold, warm, size, *batches = asked
    assert "NUMBA_CACHE_DIR" in cold[1]
    assert warm[1] == {}
    assert size[0][0].endswith("mnist-2000")
    assert [line[line.index("--batch-size") + 1] for line, _ in batches] == [
        "32",
        "64",
        "128",
        "256",
        "512",
        "1024",
    ]
    outs = [line[line.index("--out") + 1] for line, _ in asked]
    assert len(set(outs)) == len(outs)
    assert rows[0]["train_seconds"] == 2.0
    assert rows[0]["process_seconds"] == 4.0


def test_a_first_run_never_finds_the_cache_of_another(tmp_path, asked):
    first = cases_in(tmp_path)[0]
    first.run()
    first.run()
    assert asked[0][1] != asked[1][1]


def test_mnist_is_repeated_in_order(tmp_path):
    train = load("mnist").train
    repeated = load(mnist_of(61_000, tmp_path)).train
    assert len(repeated) == 61_000
    assert np.array_equal(repeated.images[60_000:], train.images[:1000])
    assert np.array_equal(repeated.labels[60_000:], train.labels[:1000])


def rows_of(times):
    return [
        {
            "part": "batches",
            "case": f"batch {batch}",
            "size": 60_000,
            "batch": batch,
            "precision": "fp32",
            "images": 60_000,
            "steps": 4,
            "first_step_seconds": 1.0,
            "train_seconds": 1.0 + 0.75 * seconds,
            "evaluate_seconds": 1.0,
            "process_seconds": seconds + 4,
            "test_accuracy": 0.98,
            "peak_rss_mb": 600.0,
        }
        for batch, seconds in times
    ]


def test_flat_is_within_a_tenth_and_bends_are_named():
    assert (
        scaling_report.verdict(rows_of([(32, 6.5), (64, 6.0), (128, 5.5)])) == "flat within 10% of batch 64"
    )
    bent = scaling_report.verdict(rows_of([(32, 9.0), (64, 6.0), (64, 6.0), (1024, 3.0)]))
    assert bent == "outside 10% of batch 64: batch 32 (1.50 ×), batch 1024 (0.50 ×)"


def test_the_table_shows_medians_per_image():
    result = scaling_report.result_of(rows_of([(64, 6.0), (64, 60.0), (64, 6.6), (32, 12.0)]))
    found = [(line["case"], line["µs per image"], line["training, s"], line["runs"]) for line in result.rows]
    assert found == [("batch 64", "110.0", "5.95", "3"), ("batch 32", "200.0", "10.00", "1")]
    assert result.summary["most memory held"] == "600 MB"
    assert len(result.measured) == 4
