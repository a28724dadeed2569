"""The errors that a user can correct. Each message is one line: what was wrong, and what to do."""


class GammabetaError(Exception):
    """Base of the errors that a user can correct; the command line prints it and exits with ``exit_code``."""

    exit_code = 2


class UsageError(GammabetaError, ValueError):
    """An argument, option or setting that cannot be used."""


class DataError(GammabetaError, ValueError):
    """Input data that is damaged, unreadable, or not what it says it is."""


class RunError(GammabetaError):
    """A run folder that is missing, in use, or not a run folder."""


class WeightsError(GammabetaError, ValueError):
    """Weights that are damaged, or that do not fit the model."""


class SurgeryError(GammabetaError, RuntimeError):
    """A change to a model that could not be carried out; the model is as it was before."""


class NotFiniteError(SurgeryError):
    """Statistics that are not finite numbers; the model is as it was before."""


class DivergedError(GammabetaError, ArithmeticError):
    """A training whose loss or weights are no longer finite numbers; ``steps`` were taken before."""

    def __init__(self, message: str, steps: int = 0) -> None:
        super().__init__(message)
        self.steps = steps


class UnavailableError(GammabetaError, RuntimeError):
    """A device, backend or optional package that was asked for and is missing."""


class GammabetaWarning(UserWarning):
    """Something to know that stops nothing: a file of a later version, say. A command prints it as a line."""
