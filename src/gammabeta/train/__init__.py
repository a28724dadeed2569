"""Recipes, the network, the training loop and the run folder it leaves behind."""

from .fit import Observer, Outcome, TrainingInterrupted, build_network, fit
from .load import Trained, load_model
from .network import DigitNetwork, LayerView
from .recipe import Recipe
from .recipe import load as load_recipe
from .recipe import names as recipe_names
from .run import Run

__all__ = [
    "DigitNetwork",
    "LayerView",
    "Observer",
    "Outcome",
    "Recipe",
    "Run",
    "Trained",
    "TrainingInterrupted",
    "build_network",
    "fit",
    "load_model",
    "load_recipe",
    "recipe_names",
]
