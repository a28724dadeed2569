"""What the advice says of given figures."""

import pytest

from gammabeta.measure.report import EVALUATION, TRAINING, BenchmarkReport, Row, readable


def row(task, way, seconds, base, kept=None):
    return Row(task, way, seconds, seconds * 0.99, seconds * 1.01, base / seconds, kept, 0.0)


def report(fused=1.0, folded=1.0, kept=100_000_000, share=0.2):
    rows = (
        row(TRAINING, "as it is", 1.0, 1.0, 100_000_000),
        row(TRAINING, "fused", fused, 1.0, kept),
        row(EVALUATION, "as it is", 1.0, 1.0),
        row(EVALUATION, "folded", folded, 1.0),
        Row(EVALUATION, "ONNX Runtime", reason="onnx is not installed"),
    )
    return BenchmarkReport(rows, 3, share, 2)


def test_nothing_to_gain_is_said_with_the_share_of_batch_norm():
    assert report().advice == (
        "There is nothing to gain for this model on this input: batch norm takes 20% of a training step. "
        "Leave it as it is."
    )


@pytest.mark.parametrize(
    ("figures", "says", "silent"),
    [
        ({"fused": 0.8}, "gammabeta.convert(model) for training (1.25 times as fast)", "fold"),
        ({"folded": 0.5}, "gammabeta.fold(model, example) for serving (2.00 times as fast)", "convert"),
        ({"kept": 60_000_000}, "(40% less kept for the backward pass)", "fast"),
        ({"kept": 60_000_000, "fused": 1.25}, "40% less kept for the backward pass, but only 0.80", "fold"),
        ({"kept": 95_000_000}, "nothing to gain", "kept"),  # too little to speak of
        ({"fused": 0.985}, "nothing to gain", "convert"),  # within the spread
    ],
)
def test_advice_names_what_is_gained(figures, says, silent):
    advice = report(**figures).advice
    assert says in advice
    assert silent not in advice


def test_a_table_names_why_a_way_is_missing():
    assert "onnx is not installed" in str(report())


@pytest.mark.parametrize(("seconds", "text"), [(1.5, "1.5 s"), (0.0123, "12.3 ms"), (4.2e-5, "42 µs")])
def test_times_are_in_the_unit_that_suits_them(seconds, text):
    assert readable(seconds) == text
