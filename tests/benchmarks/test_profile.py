"""The suite profile: times go to the right parts, and a table comes of a real step."""

import json

import pytest

from benchmarks.run import main
from benchmarks.suites import profile


def test_an_operators_own_time_counts_for_the_nearest_part_around_it():
    events = [
        ("aten::convolution_backward", 5.0, ["autograd::engine::evaluate_function: ConvolutionBackward0"]),
        ("aten::empty", 3.0, ["_ConvolveBackward"]),
        ("aten::mm", 2.0, ["AddmmBackward0"]),
        ("aten::copy_", 1.0, ["aten::to", "aten::conv2d"]),
        ("aten::copy_", 4.0, []),
    ]
    assert profile.own_times(events) == {
        "convolutions, backward": 8.0,
        "linear layers": 2.0,
        "casts to and from bf16": 1.0,
        profile.OTHER: 4.0,
    }


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("_TrainBackward", "batch norm + ReLU + pooling, backward"),
        ("_Train", "batch norm + ReLU + pooling, forward"),
        ("_Convolve", "convolutions, forward"),
        ("autograd::engine::evaluate_function: _ConvolveBackward", "convolutions, backward"),
        ("aten::empty", None),
    ],
)
def test_a_name_belongs_to_one_part(name, part):
    assert profile.part_of(name) == part


def test_the_parts_of_a_real_step_add_up(tmp_path):
    assert main(["profile", "--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("profile-quick-*.json")
    rows = {row["case"]: row for row in json.loads(path.read_text())["rows"]}
    for column in ("fp32, ms", "bf16, ms"):
        times = {case: float(row[column]) for case, row in rows.items()}
        parts = sum(times[case] for case in (*profile.PARTS, profile.OTHER, profile.PYTHON))
        assert parts == pytest.approx(times[profile.WHOLE], abs=0.06)
        assert times["convolutions, backward"] > 0
        assert times[profile.FIRST] > 0
        assert times[profile.UNPROFILED] > 0
    assert float(rows["casts to and from bf16"]["bf16, ms"]) > 0
