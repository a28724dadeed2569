"""``gb.fit`` takes what people have: a data set or a recipe, or their names; and says what it cannot take."""

from pathlib import Path

import numpy as np
import pytest
from torch import nn

import gammabeta as gb
from gammabeta.errors import UsageError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    images = np.arange(40 * 256).reshape(40, 16, 16).astype(np.uint8)
    labels = np.arange(40) % 2
    np.savez(tmp_path / "two.npz", x_train=images, y_train=labels, x_test=images[:8], y_test=labels[:8])
    return tmp_path / "two.npz"


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 5, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))


def test_names_do_as_well(file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('base = "fast"\nepochs = 2\nprecision = "fp32"\n', "utf-8")
    outcomes = [
        gb.fit(model(), given, recipe)
        for given, recipe in (
            (file, tmp_path / "mine.toml"),
            (gb.data.load(file), gb.train.load_recipe(tmp_path / "mine.toml")),
        )
    ]
    assert [outcome.progress.images for outcome in outcomes] == [80, 80]
    assert gb.fit(model(), str(file), "fast").progress.images == 40


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("model", "mnist", "fast"), "fit: model is str; give a torch.nn.Module"),
        ((nn.Linear, "mnist", "fast"), "fit: model is the class Linear; give a torch.nn.Module"),
        (
            (model(), np.zeros(3), "fast"),
            "fit: dataset is ndarray; give a gammabeta.data.Dataset, or the name",
        ),
        (
            (model(), "FILE", {"epochs": 3}),
            "fit: recipe is dict; give a gammabeta.train.Recipe, a recipe's name",
        ),
        ((model(), "FILE", "quick"), "unknown recipe 'quick'"),
    ],
)
def test_what_is_of_another_type(arguments: tuple[object, ...], said: str, file: Path) -> None:
    given = [str(file) if isinstance(value, str) and value == "FILE" else value for value in arguments]
    with pytest.raises(UsageError) as raised:
        gb.fit(*given)  # type: ignore[arg-type]
    assert str(raised.value).startswith(said)


def test_what_evaluate_cannot_take() -> None:
    with pytest.raises(UsageError, match="evaluate takes a run folder or what load gave, not int"):
        gb.evaluate(3)  # type: ignore[arg-type]


def test_a_data_set_says_in_a_line_what_it_is(file: Path) -> None:
    dataset = gb.data.load(file)
    assert repr(dataset) == "<Dataset 'two': 40 train, 8 test images of 1×16×16, 2 classes>"
    assert repr(dataset.train) == "<Split: 40 images of 1×16×16>"
