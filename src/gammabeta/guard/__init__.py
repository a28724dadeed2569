"""The guard: looks at the batch norms of a model while it is trained, and changes no number of it."""

from .watch import Guard, GuardError, Noticed, watch

__all__ = ["Guard", "GuardError", "Noticed", "watch"]
