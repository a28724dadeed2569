"""Which recipe suits a data set, where none is named."""

from collections.abc import Sequence

from ..data import Dataset
from .documents import NetworkInfo
from .recipe import Recipe, load_recipe

AUTO = "auto"
_DIGIT_SIDE = 40  # pixels: the digit network's last feature map grows with the picture
_DIGIT_IMAGES = 15_000  # images that `fast` sees at least: a small set is seen several times
_OBJECT_EPOCHS = 5.0  # of `fast`, where the whole frame is filled: half an epoch is for digits
_PICTURES = (24_000, 5.0, 40.0)  # images that `pictures` sees, and the fewest and most epochs for it


def choose(
    dataset: Dataset,
    overrides: Sequence[str] = (),
    begin_with: NetworkInfo | None = None,
    model: str | None = None,
) -> tuple[Recipe, str]:
    """Choose a built-in recipe for a data set, and how long it trains.

    Small grey pictures with a clean background, as digits are, get ``fast``; all others ``pictures``.

    Args:
        dataset: What is to be trained on.
        overrides: ``field=value`` settings, which are stronger than what is chosen.
        begin_with: The network whose weights the training begins with, which has the last word.
        model: Another network than a recipe's, which ``fast`` does not suit.

    Returns:
        The recipe, and a line that names it and says why.
    """
    images = len(dataset.train)
    channels, height, width = dataset.image_shape
    preparation = dataset.settled().preparation
    style = "plain" if preparation is None else preparation.style
    clean = style != "plain" and channels == 1 and max(height, width) <= _DIGIT_SIDE
    why = f"{'grey' if channels == 1 else 'colour'} pictures of {height}×{width}"
    why += " with a clean background" if clean else ""
    if model is not None:
        clean, why = False, f"for {model}"
    elif begin_with is not None:
        clean = begin_with.kind == "digits"
        why = "as the run whose weights it begins with"
    if clean:
        least = 0.5 if style == "digit" else _OBJECT_EPOCHS
        name, epochs = "fast", max(least, _DIGIT_IMAGES / images)
    else:
        seen, least, most = _PICTURES
        name, epochs = "pictures", min(max(least, seen / images), most)
    epochs = epochs if epochs < 1 else round(epochs)
    recipe = load_recipe(name, [f"epochs={epochs}", *overrides])
    told = f"recipe {name}, {recipe.epochs:g} epochs: {why}; --recipe and --epochs choose otherwise"
    return recipe, told
