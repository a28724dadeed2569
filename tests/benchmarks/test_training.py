"""The suite training: rounds, the gate, the report; one real run of our own command on a part of MNIST."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks.harness import command, report
from benchmarks.run import run
from benchmarks.suites import training, training_report
from gammabeta.errors import UnavailableError, UsageError


def contestant(name, accuracy=0.99, error=None, loss=0.06, recipe="classic"):
    def run(seed):
        if error:
            raise UnavailableError(error)
        return {"test_accuracy": accuracy, "epoch_seconds": float(seed), "moving_loss": loss}

    return training.Contestant(name, name.title(), recipe, "fp32", run)


def test_every_round_runs_everyone_and_begins_with_another():
    everyone = [contestant("a"), contestant("b"), contestant("c")]
    orders = [[row["contestant"] for row in training.play_round(everyone, n, 1)] for n in (1, 2, 3)]
    assert [order[0] for order in orders] == ["b", "c", "a"]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)


def test_out_of_bounds_or_failed_does_not_count():
    everyone = [
        contestant("good"),
        contestant("unlucky", accuracy=0.979),
        contestant("bad", accuracy=0.96),
        contestant("wrong", loss=0.2),
        contestant("smoothed", loss=0.8, recipe="fast"),
        contestant("gone", error="no environment"),
    ]
    rows = {row["contestant"]: row for row in training.play_round(everyone, 1, 1)}
    assert {name for name, row in rows.items() if row["counts"]} == {"good", "unlucky", "smoothed"}
    assert rows["gone"]["error"] == "no environment"
    assert rows["good"]["process_seconds"] >= 0
    trial = {row["contestant"]: row for row in training.play_round(everyone, 1, 1, gated=False)}
    assert {name for name, row in trial.items() if not row["counts"]} == {"gone"}


def our_run(**seconds):
    result = {
        "seconds": {"train": 5.0, "first_step": 0.5, "recalibrate": 0.0, "evaluate": 1.0} | seconds,
        "precision": "bf16",
        "images": 60_000,
        "steps": 91,
        "loss": 0.06,
        "train_accuracy": 0.99,
        "test_accuracy": 0.98,
    }
    return command.Run(result, 9.0, 700.0)


def test_our_first_step_is_our_warm_up():
    figures = training.own_figures(our_run())
    assert (figures["epoch_seconds"], figures["warmup_seconds"]) == (pytest.approx(4.5 * 91 / 90), 0.5)
    assert (figures["process_seconds"], figures["peak_rss_mb"]) == (9.0, 700.0)


def test_a_training_that_recalibrates_is_counted_whole():
    figures = training.own_figures(our_run(recalibrate=0.25))
    assert (figures["epoch_seconds"], figures["warmup_seconds"]) == (5.25, None)


def test_medians_ratios_and_failures_are_reported(row):
    rows = [
        *(row(epoch=epoch) for epoch in (30.0, 10.0, 12.0)),
        row("keras", "Keras", 20.0),
        row("gammabeta", "gammabeta", 6.0),
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
    assert "- does not count: JAX: accuracy 0.5, loss 0.0600" in result.notes
    assert "- does not count: MXNet: no environment" in result.notes
    assert "Peers: torch 2.13.0." in result.notes


def test_a_peer_that_is_quicker_in_bf16_is_named(row):
    rows = [
        row("keras", "Keras", 9.0),
        row("keras-bf16", "Keras", 6.0, precision="bf16"),
        row("gammabeta", "gammabeta", 4.5),
        row("gammabeta-bf16", "gammabeta", 3.0, precision="bf16"),
    ]
    assert training_report.result_of(rows).summary == {
        "quickest peer": "Keras, 9.00 s",
        "quickest peer in any precision": "Keras, bf16, 6.00 s",
        "gammabeta, recipe classic, bf16": "3.00 s, 3.00 times as fast "
        "(2.00 times the quickest in any precision)",
        "gammabeta, recipe classic": "4.50 s, 2.00 times as fast",
    }


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
    run([*trial, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("training-quick-*.json")
    (measured,) = json.loads(path.read_text())["measured"]
    assert (measured["images"], measured["steps"], measured["precision"]) == (1000, 16, "fp32")
    assert measured["process_seconds"] > measured["epoch_seconds"] > 0
    assert measured["peak_rss_mb"] > 100
    assert measured["threads"] == 1
    with pytest.raises(UsageError, match="other than 2 threads"):
        run([*trial[:-1], "2", "--append", "--out", str(tmp_path)])
    assert "gammabeta, recipe classic" in path.with_suffix(".md").read_text("utf-8")


def test_a_failing_command_says_why(tmp_path):
    with pytest.raises(UnavailableError, match=r"code 2.*no such data set"):
        command.train([str(tmp_path / "nowhere")], 60)
    with pytest.raises(UnavailableError, match="too long"):
        command.train(["mnist", "--out", str(tmp_path / "run")], 0.2)
