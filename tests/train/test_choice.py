"""The recipe that a data set gets where none is named."""

import numpy as np
import pytest

from gammabeta import data
from gammabeta.data import Dataset, Split
from gammabeta.train import load_recipe
from gammabeta.train.choice import choose
from gammabeta.train.session import describe


def photos(count: int, channels: int = 3, side: int = 64) -> Dataset:
    random = np.random.default_rng(0)
    split = Split(
        random.integers(0, 256, (count, channels, side, side), np.uint8), np.arange(count, dtype=np.int64) % 2
    )
    return Dataset("photos", split, split, ("a", "b"))


def test_mnist_gets_fast_as_it_stands() -> None:
    recipe, told = choose(data.load("mnist"))
    assert recipe == load_recipe("fast")
    assert told.startswith("recipe fast, 0.5 epochs: grey pictures of 28×28 with a clean background")


def test_few_digits_are_seen_more_often(digits: Dataset) -> None:
    recipe, _ = choose(digits)
    assert (recipe.name, recipe.epochs) == ("fast", round(15_000 / 640))


@pytest.mark.parametrize(("channels", "side"), [(3, 64), (3, 28), (1, 28), (1, 64)])
def test_other_pictures_get_the_residual_network(channels: int, side: int) -> None:
    recipe, told = choose(photos(100, channels, side))
    assert (recipe.name, recipe.network) == ("pictures", "residual")
    assert f"of {side}×{side}" in told


def test_what_is_set_is_stronger(digits: Dataset) -> None:
    assert choose(digits, ["epochs=3", "flip=true"])[0] == load_recipe("fast", ["epochs=3", "flip=true"])


def test_weights_to_begin_with_and_a_model_decide(digits: Dataset) -> None:
    residual = describe(digits, load_recipe("pictures"))
    assert choose(digits, begin_with=residual)[0].name == "pictures"
    assert choose(photos(50, 1, 28), begin_with=describe(digits, load_recipe("fast")))[0].name == "fast"
    assert choose(digits, model="nets:make")[0].name == "pictures"
