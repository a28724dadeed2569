"""The suite training: rounds, the gate, the report; one real run of our own command on a part of MNIST."""

import argparse
import json

import pytest

from gammabeta.bench import own, results, training, training_report
from gammabeta.errors import UnavailableError, UsageError


def contestant(name, accuracy=0.99, error=None):
    def run(seed):
        if error:
            raise UnavailableError(error)
        return {"test_accuracy": accuracy, "epoch_seconds": float(seed)}

    return training.Contestant(name, name.title(), "classic", "fp32", run)


def test_every_round_runs_everyone_and_begins_with_another():
    everyone = [contestant("a"), contestant("b"), contestant("c")]
    orders = [[row["contestant"] for row in training.play_round(everyone, n, 0.98)] for n in (1, 2, 3)]
    assert [order[0] for order in orders] == ["b", "c", "a"]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)


def test_below_the_gate_or_failed_does_not_count():
    everyone = [
        contestant("good"),
        contestant("bad", accuracy=0.97),
        contestant("gone", error="no environment"),
    ]
    rows = {row["contestant"]: row for row in training.play_round(everyone, 1, training.GATE)}
    assert [rows[name]["counts"] for name in ("good", "bad", "gone")] == [True, False, False]
    assert rows["gone"]["error"] == "no environment"
    assert rows["good"]["process_seconds"] >= 0


def test_our_figures_count_recalibration_as_training():
    seconds = {"train": 5.0, "recalibrate": 0.25, "evaluate": 1.0, "load": 0.1}
    result = {
        "seconds": seconds,
        "precision": "bf16",
        "images": 60_000,
        "steps": 938,
        "loss": 0.06,
        "train_accuracy": 0.99,
        "test_accuracy": 0.98,
    }
    figures = training.own_figures(own.OwnRun(result, 9.0, 700.0))
    assert figures["epoch_seconds"] == 5.25
    assert (figures["process_seconds"], figures["peak_rss_mb"]) == (9.0, 700.0)


def test_outside_a_checkout_only_gammabeta_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("gammabeta.bench.peers.CHECKOUT", tmp_path)
    options = argparse.Namespace(peers_dir=tmp_path, timeout=1)
    assert training.peer_contestants(options, tmp_path) == []
    assert "repository's benchmarks/peers" in capsys.readouterr().out


def test_medians_ratios_and_failures_are_in_the_page(row, stamped):
    rows = [
        *(row(epoch=epoch) for epoch in (30.0, 10.0, 12.0)),
        row("keras", "Keras", 20.0),
        row("gammabeta", "gammabeta", 6.0, warmup_seconds=None),
        row("gammabeta-bf16", "gammabeta", 3.0, precision="bf16", warmup_seconds=None),
        row("jax", "JAX", 1.0, test_accuracy=0.5, counts=False),
        {
            **{k: row()[k] for k in ("recipe", "round")},
            "contestant": "mxnet",
            "title": "MXNet",
            "precision": "fp32",
        }
        | {"counts": False, "error": "no environment"},
    ]
    summaries = training_report.summarise(rows)
    assert [s.name for s in summaries if s.runs] == ["gammabeta-bf16", "gammabeta", "pytorch-eager", "keras"]
    eager = summaries[2]
    assert (eager.medians["epoch_seconds"], eager.fastest, eager.slowest, eager.runs) == (12.0, 10.0, 30.0, 3)
    assert training_report.quickest_peer(summaries).name == "pytorch-eager"
    page = training_report.report(stamped, rows)
    cells = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    ratios = {line[0].strip("| *"): line[5] for line in cells}
    assert ratios["gammabeta, recipe classic"] == "0.50"
    assert ratios["gammabeta, recipe classic, bf16"] == "0.25"
    assert ratios["Keras"] == "1.67"
    assert "- JAX: accuracy 0.5" in page
    assert "- MXNet: no environment" in page
    assert "2 cores of Some CPU (family 26), AVX512 with bf16" in page


def test_without_any_peer_there_is_no_ratio(row, stamped):
    page = training_report.report(stamped, [row("gammabeta", "gammabeta", 6.0)])
    assert "| 6.00 | 6.00–6.00 |  |" in page


def test_the_chart_cuts_only_a_bar_that_dwarfs_the_others():
    assert training_report._limit([5.0, 10.0, 12.0]) == 12.0
    assert training_report._limit([5.0, 10.0, 100.0]) == pytest.approx(11.0)
    assert training_report._limit([7.0]) == 7.0


def test_the_report_writes_page_and_chart(tmp_path, row, stamped):
    rows = [row(), row("gammabeta", "gammabeta", 5.0), row("tinygrad", "tinygrad", 100.0)]
    page = training_report.write_report(tmp_path, stamped, rows)
    assert (tmp_path / "training.md").read_text("utf-8") == page
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_rows_are_added_only_to_those_of_the_same_machine(tmp_path, row, stamped):
    path = tmp_path / "training.json"
    assert results.read_rows(path, stamped["machine"]) == []
    results.write_json(path, stamped, [row()])
    assert results.read_rows(path, stamped["machine"]) == [row()]
    with pytest.raises(UsageError, match="another machine"):
        results.read_rows(path, {**stamped["machine"], "cores": 64})


def test_our_own_command_is_measured_from_outside(tmp_path, capsys):
    from gammabeta.bench.suites import main

    arguments = ["training", "--images", "1000", "--only", "gammabeta", "--rounds", "1", "--threads", "1"]
    assert main([*arguments, "--results", str(tmp_path / "out")], "bench") == 0
    document = json.loads((tmp_path / "out" / "training.json").read_text())
    (measured,) = document["rows"]
    assert (measured["images"], measured["steps"], measured["precision"]) == (1000, 16, "fp32")
    assert measured["process_seconds"] > measured["epoch_seconds"] > 0
    assert measured["peak_rss_mb"] > 100
    assert "gammabeta, recipe classic" in capsys.readouterr().out


def test_a_failing_command_says_why(tmp_path):
    with pytest.raises(UnavailableError, match=r"code 2.*no such data set"):
        own.train([str(tmp_path / "nowhere")], 60)
    with pytest.raises(UnavailableError, match="too long"):
        own.train(["mnist", "--out", str(tmp_path / "run")], 0.2)
