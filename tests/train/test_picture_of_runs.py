"""The picture of runs side by side."""

from pathlib import Path

from gammabeta.train.plots import curves_of_runs
from gammabeta.train.run import Run

RECORDED = Path(__file__).parents[1] / "previous"


def test_no_axis_shows_more_than_all_images_right() -> None:
    runs = [Run.open(path.parent) for path in sorted(RECORDED.rglob("run.json"))][:1]
    loss, accuracy = curves_of_runs(runs).axes
    assert accuracy.get_ylim()[1] <= 100
    assert accuracy.get_xlim() == loss.get_xlim()
