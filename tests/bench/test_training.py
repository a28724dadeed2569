"""The suite training: rounds, the gate, the report; one real run of our own command on a part of MNIST."""

import argparse
import json
import xml.etree.ElementTree as ElementTree

import pytest

from gammabeta.bench import own, report, training, training_report
from gammabeta.bench.command import main
from gammabeta.errors import UnavailableError, UsageError


def contestant(name, accuracy=0.99, error=None):
    def run(seed):
        if error:
            raise UnavailableError(error)
        return {"test_accuracy": accuracy, "epoch_seconds": float(seed), "moving_loss": 0.1}

    return training.Contestant(name, name.title(), "classic", "fp32", run)


def test_every_round_runs_everyone_and_begins_with_another():
    everyone = [contestant("a"), contestant("b"), contestant("c")]
    orders = [[row["contestant"] for row in training.play_round(everyone, n, 0.98, 1)] for n in (1, 2, 3)]
    assert [order[0] for order in orders] == ["b", "c", "a"]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)


def test_below_the_gate_or_failed_does_not_count():
    everyone = [
        contestant("good"),
        contestant("bad", accuracy=0.97),
        contestant("gone", error="no environment"),
    ]
    rows = {row["contestant"]: row for row in training.play_round(everyone, 1, training.GATE, 1)}
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


def test_medians_ratios_and_failures_are_reported(row):
    rows = [
        *(row(epoch=epoch) for epoch in (30.0, 10.0, 12.0)),
        row("keras", "Keras", 20.0),
        row("gammabeta", "gammabeta", 6.0, warmup_seconds=None),
        row("gammabeta-bf16", "gammabeta", 3.0, precision="bf16", warmup_seconds=None),
        row("jax", "JAX", 1.0, test_accuracy=0.5, counts=False),
        {"contestant": "mxnet", "title": "MXNet", "recipe": "classic", "precision": "fp32", "round": 1}
        | {"counts": False, "error": "no environment"},
    ]
    summaries = training_report.summarise(rows)
    assert [s.name for s in summaries if s.runs] == ["gammabeta-bf16", "gammabeta", "pytorch-eager", "keras"]
    eager = summaries[2]
    assert (eager.medians["epoch_seconds"], eager.fastest, eager.slowest, eager.runs) == (12.0, 10.0, 30.0, 3)
    result = training_report.result_of(rows)
    ratios = {line["case"].strip("*"): line["of the quickest peer"] for line in result.rows}
    assert ratios == {
        "gammabeta, recipe classic, bf16": "0.25",
        "gammabeta, recipe classic": "0.50",
        "PyTorch eager": "1.00",
        "Keras": "1.67",
    }
    assert result.summary["quickest peer"] == "PyTorch eager, 12.00 s"
    assert result.summary["gammabeta, recipe classic"] == "6.00 s, 2.00 times as fast"
    assert "- does not count: JAX: accuracy 0.5" in result.notes
    assert "- does not count: MXNet: no environment" in result.notes
    assert "Peers: torch 2.13.0." in result.notes


def test_without_any_peer_there_is_no_ratio(row):
    result = training_report.result_of([row("gammabeta", "gammabeta", 6.0)])
    assert result.rows[0]["of the quickest peer"] == ""
    assert result.summary == {}


def test_without_any_counted_run_there_is_no_picture(row):
    result = training_report.result_of([row(counts=False)])
    assert result.rows == []
    assert result.draw is None


def test_the_chart_cuts_only_a_bar_that_dwarfs_the_others():
    assert training_report._limit([5.0, 10.0, 12.0]) == 12.0
    assert training_report._limit([5.0, 10.0, 100.0]) == pytest.approx(11.0)
    assert training_report._limit([7.0]) == 7.0


def test_the_chart_names_everyone(tmp_path, row):
    rows = [row(), row("gammabeta", "gammabeta", 5.0), row("tinygrad", "tinygrad", 100.0)]
    for path in report.write("training", training_report.result_of(rows), tmp_path):
        if path.suffix == ".svg":
            drawn = path.read_text("utf-8")
            ElementTree.fromstring(drawn)
            assert all(
                f"<!-- {text} -->" in drawn for text in ("PyTorch eager", "5.0 s", "100.0 s (bar cut)")
            )


def test_the_runs_of_an_earlier_result_are_read_back(tmp_path, row):
    assert report.measured("training", tmp_path) == []
    report.write("training", training_report.result_of([row()]), tmp_path)
    assert report.measured("training", tmp_path) == [row()]


def test_our_own_command_is_measured_from_outside(tmp_path):
    trial = ["training", "--quick", "--images", "1000", "--only", "gammabeta", "--threads", "1"]
    assert main([*trial, "--out", str(tmp_path)], "bench") == 0
    (path,) = tmp_path.glob("training-quick-*.json")
    (measured,) = json.loads(path.read_text())["measured"]
    assert (measured["images"], measured["steps"], measured["precision"]) == (1000, 16, "fp32")
    assert measured["process_seconds"] > measured["epoch_seconds"] > 0
    assert measured["peak_rss_mb"] > 100
    assert measured["threads"] == 1
    with pytest.raises(UsageError, match="other than 2 threads"):
        main([*trial[:-1], "2", "--append", "--out", str(tmp_path)], "bench")
    assert "gammabeta, recipe classic" in path.with_suffix(".md").read_text("utf-8")


def test_a_failing_command_says_why(tmp_path):
    with pytest.raises(UnavailableError, match=r"code 2.*no such data set"):
        own.train([str(tmp_path / "nowhere")], 60)
    with pytest.raises(UnavailableError, match="too long"):
        own.train(["mnist", "--out", str(tmp_path / "run")], 0.2)
