"""The learning-rate range test."""

import math

import numpy as np
import pytest

from gammabeta.data import Dataset
from gammabeta.errors import UsageError
from gammabeta.train import build_network, load_recipe
from gammabeta.train.rate import HIGHEST, LOWEST, _read, find_rate


def test_a_curve_is_read() -> None:
    """A loss of 2 that falls from rate 1e-3 to 0.1, by the logarithm, and rises from there."""
    rates = [LOWEST * (HIGHEST / LOWEST) ** (step / 99) for step in range(100)]
    places = [math.log10(rate) for rate in rates]
    losses = [2 - 0.5 * (min(max(place, -3), -1) + 3) + 3 * max(place + 1, 0) for place in places]
    found = _read(rates, losses)
    assert found.low == pytest.approx(10**-2.8, rel=0.3)
    assert found.high == pytest.approx(0.1, rel=0.2)
    assert found.low < found.suggested <= found.high
    with pytest.raises(UsageError, match="falls at no learning rate"):
        _read(rates, [2.0] * 100)


def test_a_flat_and_noisy_bottom_does_not_push_the_rate_up() -> None:
    """Adam's steps have one length: the loss stays low over decades of rates, where its minimum is chance."""
    rates = [LOWEST * (HIGHEST / LOWEST) ** (step / 99) for step in range(100)]
    for seed in range(20):
        random = np.random.default_rng(seed)
        losses, average = [], 0.0
        for step, rate in enumerate(rates):
            place = math.log10(rate)
            loss = 2.3 - 0.4 * min(max(place + 5, 0), 2) + 3 * max(place - 0.5, 0) + 0.15 * random.normal()
            average += 0.15 * (loss - average)
            losses.append(average / (1 - 0.85 ** (step + 1)))
        found = _read(rates, losses)
        assert 1e-6 < found.low < 2e-4
        assert 1e-4 < found.suggested <= found.high < 0.1  # the plateau ends at 3


def test_a_test_of_digits_finds_rates_that_train(digits: Dataset) -> None:
    recipe = load_recipe("fast", {"batch_size": 64, "precision": "fp32"})
    found = find_rate(build_network(recipe, digits, 0), digits, recipe, device="cpu", steps=60)
    assert LOWEST < found.low < found.suggested <= found.high < HIGHEST
    assert 0.01 < found.suggested < 3  # the recipe's, found by search, is 0.4
    with pytest.raises(UsageError, match="at least 20"):
        find_rate(build_network(recipe, digits, 0), digits, recipe, device="cpu", steps=5)


def test_a_summed_loss_has_smaller_rates(digits: Dataset) -> None:
    recipe = load_recipe("classic", {"initialization": "he"})
    found = find_rate(build_network(recipe, digits, 0), digits, recipe, device="cpu", steps=60)
    assert found.rates[0] == LOWEST / 64
    assert found.suggested < 0.1
