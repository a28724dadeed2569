"""The errors that a user can correct. Each message is one line: what was wrong, and what to do."""

import re

from .text import one_line


class GammabetaError(Exception):
    """Base of the errors that a user can correct; the command line prints it and exits with ``exit_code``."""

    exit_code = 2

    def __str__(self) -> str:
        return one_line(super().__str__())  # names in it are other people's text


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


_MEMORY = re.compile(
    r"out of memory|(?:can.t|failed to|unable to) allocate|not enough memory|bad_alloc", re.I
)
_WANTED = re.compile(r"allocate ([\d.]+ ?(?:bytes|[KMGT]i?B))", re.I)


def out_of_memory(error: BaseException | None) -> str | None:
    """A line that says what to do, if memory ran out: in Python, in a library, on a GPU; else None."""
    while error is not None:
        text = str(error)
        library = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime")
        if isinstance(error, MemoryError) or (library and _MEMORY.search(text)):
            found = _WANTED.search(text)
            wanted = f" ({_readable(found[1])} wanted at once)" if found else ""
            return (
                f"out of memory{wanted}: use smaller pictures (--image-size), smaller batches (--batch-size "
                "or --batch), or fewer pictures at a time"
            )
        error = error.__cause__ or error.__context__
    return None


def _readable(size: str) -> str:
    count, unit = size.split()[0], size.split()[-1]
    return f"{int(count) / 2**30:.1f} GiB" if unit == "bytes" and count.isdecimal() else size


def installing(extra: str) -> str:
    """How to install what an extra of ours holds: our name on the index is not ours."""
    return f'in a clone of gammabeta run pip install -c constraints.txt ".[{extra}]"'
