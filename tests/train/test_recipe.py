from pathlib import Path

import pytest

from gammabeta.errors import UsageError
from gammabeta.train import load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_are_valid_and_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    loaded = load_recipe(name)
    copy = tmp_path / f"{name}.toml"
    copy.write_text(loaded.to_toml(), "utf-8")
    assert loaded.name == name
    assert load_recipe(copy) == loaded


def test_classic_is_the_notebooks_training() -> None:
    classic = load_recipe("classic")
    assert (classic.batch_size, classic.loss, classic.learning_rate, classic.epochs) == (64, "sum", 0.001, 1)
    assert (classic.initialization, classic.running_statistics) == ("notebook", "first-batch")
    assert classic.batch_norm_momentum == 0.1
    assert classic.precision == "fp32"


def test_overrides_are_typed() -> None:
    changed = load_recipe("classic", ["learning-rate=0.5", "batch_norm=false", "epochs=2"])
    assert (changed.learning_rate, changed.batch_norm, changed.epochs) == (0.5, False, 2.0)


def test_a_file_builds_on_a_base(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "classic"\nepochs = 3\n', "utf-8")
    mine = load_recipe(path)
    assert mine == load_recipe("classic", {"epochs": 3.0, "name": "mine"})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('epochs = "3"', "epochs = '3': input should be a valid number"),
        ("batch_size = 64.0", "batch_size = 64.0: input should be a valid integer"),
        ("batch_norm = 1", "batch_norm = 1: input should be a valid boolean"),
        ("name = 5", "name = 5: input should be a valid string"),
    ],
)
def test_a_file_has_numbers_where_numbers_are_wanted(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'base = "classic"\n{line}\n', "utf-8")
    with pytest.raises(UsageError, match=words):
        load_recipe(path)
    field = line.partition(" ")[0]
    assert load_recipe(path, [f"{field}={getattr(load_recipe('fast'), field)}"])  # an option goes before it


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("nonesuch", [], ["unknown recipe 'nonesuch'", "classic", "fast", ".toml"]),
        ("nonesuch.toml", [], ["cannot read", "nonesuch.toml"]),
        ("classic", ["lerning_rate=1"], ["unknown recipe field 'lerning_rate'", "learning_rate"]),
        ("classic", ["epochs"], ["'epochs' is not FIELD=VALUE"]),
        ("classic", ["epochs=many"], ["epochs = 'many'", "number"]),
        ("classic", ["epochs=-1"], ["epochs = '-1'", "greater than 0"]),
        ("classic", ["epochs=nan"], ["epochs", "finite"]),
        ("classic", ["batch_size=1"], ["batch_size = '1'", "greater than or equal to 2"]),
        ("classic", ["precision=fp8"], ["precision = 'fp8'", "'fp32'"]),
    ],
)
def test_mistakes_get_one_line_that_names_them(name: str, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(name, overrides)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epochs = ", ["not valid TOML"]),
        ('name = "x"\nepochs = 1', ["is missing", "base"]),
        ('base = "classic"\ncolour = "red"', ["unknown field 'colour'"]),
        ('base = "{path}"', ["builds on itself"]),
        ('base = "nonesuch"', ["unknown recipe 'nonesuch'"]),
    ],
)
def test_broken_files_get_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(text.replace("{path}", str(path)), "utf-8")
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    for word in words:
        assert word in str(caught.value)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        load_recipe(path)


def test_the_suffix_of_a_file_may_be_in_capitals(tmp_path: Path) -> None:
    path = tmp_path / "MINE.TOML"
    path.write_text('base = "fast"\nepochs = 2\n', "utf-8")
    assert load_recipe(str(path)).epochs == 2
