"""Recipes, the network, the training loop and the run folder it leaves behind."""

from typing import TYPE_CHECKING

from ..lazy import importer

if TYPE_CHECKING:
    from .fitting import Observer as Observer
    from .fitting import Outcome as Outcome
    from .fitting import TrainingInterrupted as TrainingInterrupted
    from .fitting import fit as fit
    from .load import Trained as Trained
    from .load import load_model as load_model
    from .network import DigitNetwork as DigitNetwork
    from .network import LayerView as LayerView
    from .networks import build_network as build_network
    from .recipe import Recipe as Recipe
    from .recipe import load_recipe as load_recipe
    from .recipe import recipe_names as recipe_names
    from .residual import ResidualNetwork as ResidualNetwork
    from .run import Run as Run

_MODULES = {
    ".fitting": ("Observer", "Outcome", "TrainingInterrupted", "fit"),
    ".load": ("Trained", "load_model"),
    ".network": ("DigitNetwork", "LayerView"),
    ".networks": ("build_network",),
    ".recipe": ("Recipe", "load_recipe", "recipe_names"),
    ".residual": ("ResidualNetwork",),
    ".run": ("Run",),
}
_NAMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_NAMES)

__getattr__ = importer(__name__, _NAMES)
