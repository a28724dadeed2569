"""The learning rate of each step."""

import math

from .recipe import Recipe


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Return the learning rate of step ``step`` (from 0) of ``steps``: a linear warm-up, then a fall.

    The rate is taken in the middle of the step, so that no step is wasted at zero.
    """
    position = (step + 0.5) / steps
    if position < recipe.warmup:
        return recipe.learning_rate * position / recipe.warmup
    if recipe.schedule == "constant":
        return recipe.learning_rate
    gone = (position - recipe.warmup) / (1 - recipe.warmup)
    left = 1 - gone if recipe.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * gone))
    last = recipe.final_learning_rate
    return recipe.learning_rate * (last + (1 - last) * left)
