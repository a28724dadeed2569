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


class UnavailableError(GammabetaError, RuntimeError):
    """A device, backend or optional package that was asked for and is missing."""


class SurgeryError(GammabetaError, RuntimeError):
    """A change to a model that could not be carried out; the model is as it was before."""
