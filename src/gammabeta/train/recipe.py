"""Recipes: every setting of a training, validated, in TOML files that can build on one another."""

import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import RunError, UsageError
from ..files import read_bytes
from ..text import storable
from .documents import complaint, tell_unknown

Fraction = Annotated[float, Field(ge=0, le=1)]
# Of each field that 0.1.0 did not have: what a training did then. A file without a base has these too.
BEFORE: dict[str, Any] = {
    "network": "digits",
    "width": 32,
    "depth": 1,
    "optimizer": "sgd",
    "second_momentum": 0.999,
    "clip": 0.0,
    "average": "none",
    "average_from": 0.5,
    "average_weight": 0.01,
    "class_weights": "none",
    "crop": 1.0,
    "rotation": 0.0,
    "color": 0.0,
    "mixup_alpha": 0.0,
    "evaluate_train": 0,
    "patience": 0,
}
_LONGEST_FILE = 1 << 20  # bytes; a recipe has one thousand
_LONGEST_CHAIN = 20  # files that build on one another


def _printable(name: str) -> str:
    if len(name) > 100 or not name.isprintable():
        raise ValueError("a name has at most 100 characters, all of them printable")
    return name


class Recipe(BaseModel):
    """The settings of a training. No field has a default: the values stand in the recipe files.

    Statistics follow PyTorch: ``batch_norm_momentum`` is the weight of the *new* value, batches are
    normalised with the biased variance and the running variance is the unbiased one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Annotated[str, AfterValidator(_printable)] = Field(description="What the recipe is called.")
    epochs: float = Field(gt=0, le=10_000, description="Passes over the training images; may be a fraction.")
    batch_size: int = Field(ge=2, le=1 << 20, description="Images per step; one has no batch statistics.")
    loss: Literal["sum", "mean"] = Field(description="How the loss of a batch is reduced.")
    label_smoothing: float = Field(ge=0, lt=1, description="Weight of equal shares in the target.")
    learning_rate: float = Field(gt=0, le=1e6, description="The highest learning rate of the schedule.")
    schedule: Literal["constant", "linear", "cosine", "one-cycle"] = Field(
        description="Its fall after the warm-up; one-cycle: rise and fall by cosine, momentum the other way."
    )
    warmup: Fraction = Field(description="Share of the steps in which the learning rate rises linearly.")
    final_learning_rate: Fraction = Field(description="Last learning rate, as a share of the highest.")
    optimizer: Literal["sgd", "adamw"] = Field(description="Gradient descent with momentum, or AdamW.")
    momentum: float = Field(ge=0, lt=1, description="Momentum of gradient descent; AdamW's β₁.")
    second_momentum: float = Field(ge=0, lt=1, description="AdamW's β₂, of the squared gradient.")
    nesterov: bool = Field(description="Nesterov's form of momentum.")
    weight_decay: float = Field(ge=0, le=1e6, description="L2 penalty on weights; never on γ, β and biases.")
    clip: float = Field(ge=0, le=1e9, description="Largest norm of all gradients together; 0: any.")
    average: Literal["none", "ema", "swa"] = Field(
        description="End with a mean of the weights: ema, a moving average; swa, over all steps alike."
    )
    average_from: Fraction = Field(description="Share of the steps after which the mean begins.")
    average_weight: float = Field(gt=0, le=1, description="Weight of the newest step in ema.")
    class_weights: Literal["none", "balanced"] = Field(
        description="balanced: images of rare classes count more, so that every class counts alike."
    )
    network: Literal["digits", "residual"] = Field(description="The notebook's network, or a residual one.")
    width: int = Field(ge=1, le=4096, description="Channels of the residual network's first stage.")
    depth: int = Field(ge=1, le=100, description="Residual blocks in each of its three stages.")
    initialization: Literal["notebook", "he"] = Field(
        description="notebook: everything N(0, 0.01) and γ N(1, 0.01); he: He et al. 2015, γ = 1, β = 0."
    )
    hidden_bias: bool = Field(description="A bias before batch normalization, which cancels it.")
    batch_norm: bool = Field(description="False trains the twin without batch normalization.")
    batch_norm_momentum: float = Field(gt=0, le=1, description="Weight of the batch in running statistics.")
    batch_norm_eps: float = Field(gt=0, le=1, description="Added to the variance.")
    running_statistics: Literal["exponential", "first-batch"] = Field(
        description="Start the running statistics from 0 and 1, or from the first batch."
    )
    recalibrate: int = Field(
        ge=0, lt=1 << 63, description="Images for exact statistics at the end; 0: running ones."
    )
    pixels: Literal["unit", "standardized"] = Field(
        description="unit: pixels / 255; standardized: zero mean and unit variance over the training images."
    )
    shift: int = Field(ge=0, le=64, description="Random translation, at most this many pixels each way.")
    flip: bool = Field(description="Random mirror images, left and right.")
    crop: float = Field(gt=0, le=1, description="Least share of the area of a random crop; 1: no crop.")
    rotation: float = Field(ge=0, le=180, description="Random turn, at most this many degrees each way.")
    color: Fraction = Field(description="Random factors of brightness, contrast and saturation, 1 ± this.")
    mixup_alpha: float = Field(ge=0, le=100, description="α of mixup, which blends two images; 0: none.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        description="auto: bf16 where the processor computes in it, else fp32."
    )
    evaluate: Literal["epoch", "end"] = Field(description="Judge after every epoch, or once at the end.")
    evaluate_train: int = Field(
        ge=0, lt=1 << 63, description="How many training images are judged, drawn once and for all; 0: all."
    )
    patience: int = Field(
        ge=0,
        le=10_000,
        description="Stop after so many epochs without a lower test loss; 0: never.",
    )

    @model_validator(mode="after")
    def _averaged_weights_have_statistics(self) -> Self:
        if self.average != "none" and self.batch_norm and not self.recalibrate:
            raise ValueError("averaged weights need statistics of their own: set recalibrate above 0")
        return self

    def to_toml(self) -> str:
        """Return the recipe as a TOML document that ``load_recipe`` reads back."""
        return tomli_w.dumps(self.model_dump())


def recipe_names() -> list[str]:
    """Return the names of the recipes inside the package."""
    folder = files(__package__) / "recipes"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name_or_path: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Recipe:
    """Load a recipe by name or from a TOML file, with some fields set anew.

    Args:
        name_or_path: A name of ``recipe_names()`` or the path of a TOML file. A file may give all fields, or
            ``base = "<name>"`` and those that differ.
        overrides: Fields and their values, or ``"field=value"`` strings.

    Raises:
        UsageError: The recipe or a field is unknown, or a value has the wrong type or range.
    """
    settings = _read(str(name_or_path), seen=())
    given = overrides if isinstance(overrides, Mapping) else _parse(overrides)
    try:
        recipe = Recipe.model_validate(settings | dict(given))
        # An option is text; in a file a number is a number, and "24" is none.
        read = {name: getattr(recipe, name) for name in given}
        return Recipe.model_validate(settings | read, strict=True)
    except ValidationError as error:
        raise UsageError(f"recipe {name_or_path}: {_first_complaint(error)}") from None


def run_recipe(path: Path) -> tuple[Recipe, dict[str, Any]]:
    """Read the recipe of a run folder, which an earlier or a later version may have written.

    Returns:
        The recipe, and the fields that this version does not know, which are told.

    Raises:
        RunError: It is missing or damaged.
    """
    try:
        settings = _toml(str(path))
    except UsageError as error:
        raise RunError(f"{path} is damaged: {error}") from None
    unknown = {name: value for name, value in settings.items() if name not in Recipe.model_fields}
    recipe = recipe_of(settings, path)
    tell_unknown(path, list(unknown))
    return recipe, unknown


def recipe_of(settings: Mapping[str, Any], path: Path) -> Recipe:
    """Return the recipe that a document of a run holds; ``RunError`` names the document if it is damaged."""
    known = {name: value for name, value in settings.items() if name in Recipe.model_fields}
    try:
        return Recipe.model_validate(BEFORE | known, strict=True)
    except ValidationError as error:
        raise RunError(f"{path} is damaged: {complaint(error)}") from None


def differences(now: Recipe, before: Recipe, *, but: str = "") -> str:
    """Return in words what differs between two recipes beside their names; ``but``: a field left out."""
    fields = [name for name in Recipe.model_fields if name not in ("name", but)]
    pairs = [(name, getattr(now, name), getattr(before, name)) for name in fields]
    return ", ".join(f"{name} is {new!r}, was {old!r}" for name, new, old in pairs if new != old)


def _read(source: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if source in seen:
        raise UsageError(f"recipe {source} builds on itself: {' → '.join((*seen, source))}")
    if len(seen) == _LONGEST_CHAIN:
        raise UsageError(f"recipe {seen[0]} builds on more than {_LONGEST_CHAIN} others")
    settings = _toml(source)
    base = settings.pop("base", None)
    if base is None:
        return BEFORE | settings
    if not isinstance(base, str):
        raise UsageError(f"recipe {source}: base is not a name: give a recipe's, or a file ending in .toml")
    return {**_read(base, (*seen, source)), "name": storable(Path(source).stem), **settings}


def _toml(source: str) -> dict[str, Any]:
    known = recipe_names()
    if source in known:
        text = (files(__package__) / "recipes" / f"{source}.toml").read_text("utf-8")
    elif source.lower().endswith(".toml"):
        try:
            text = read_bytes(Path(source), _LONGEST_FILE, UsageError).decode("utf-8")
        except UnicodeDecodeError:
            raise UsageError(f"cannot read the recipe file {source}: it is not UTF-8 text") from None
    else:
        shown = repr(source[:100])
        raise UsageError(f"unknown recipe {shown}: choose {', '.join(known)}, or a file ending in .toml")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise UsageError(f"recipe file {source} is nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError is one; so is a number of 5,000 digits
        raise UsageError(f"recipe file {source} is not valid TOML: {str(error)[:200]}") from None


def _parse(overrides: Sequence[str]) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for item in overrides:
        field, equals, value = item.partition("=")
        field = field.strip().replace("-", "_")
        if not equals:
            raise UsageError(f"{item[:100]!r} is not FIELD=VALUE, for example learning_rate=0.1")
        if field not in Recipe.model_fields:
            raise UsageError(
                f"unknown recipe field {field[:100]!r}: choose from {', '.join(Recipe.model_fields)}"
            )
        parsed[field] = value.strip()
    return parsed


def _first_complaint(error: ValidationError) -> str:
    details = error.errors()
    first = details[0]
    field = ".".join(map(str, first["loc"]))[:100]
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown field {field!r}: choose from {', '.join(Recipe.model_fields)}{more}"
    if first["type"] == "missing":
        return f'field {field!r} is missing: give it, or add base = "fast"{more}'
    message = first["msg"].removeprefix("Value error, ")
    if not field:  # of several fields together
        return message
    given = repr(first["input"])
    given = given if len(given) <= 100 else f"{given[:100]}…"
    return f"{field} = {given}: {message[0].lower()}{message[1:]}{more}"
