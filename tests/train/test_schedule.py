import pytest

from gammabeta.train import load_recipe
from gammabeta.train.loop import learning_rate


def test_constant_stays() -> None:
    classic = load_recipe("classic")
    assert {learning_rate(classic, step, 10) for step in range(10)} == {0.001}


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_rises_then_falls_to_the_last_share(schedule: str) -> None:
    settings = {"schedule": schedule, "warmup": 0.25, "final_learning_rate": 0.1, "learning_rate": 2.0}
    rates = [learning_rate(load_recipe("classic", settings), step, 400) for step in range(400)]
    peak = rates.index(max(rates))
    assert 98 <= peak <= 101
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) == pytest.approx(2.0, rel=0.01)
    assert rates[-1] == pytest.approx(0.2, rel=0.02)
    assert rates[0] == pytest.approx(2.0 * 0.5 / 100)
