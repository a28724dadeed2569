"""The cases by subject; importing this package registers all of them."""

from . import averaged, batches, elsewhere, frozen, loading, settings, training

__all__ = ["averaged", "batches", "elsewhere", "frozen", "loading", "settings", "training"]
