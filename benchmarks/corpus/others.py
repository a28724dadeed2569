"""Other tools, asked of the same cases: what each says in words of its own, without any of ours.

Only a tool that takes a PyTorch model as the cases have it, and gives a verdict by itself, can be asked. The
doctor's page (docs/doctor.md) says why the others cannot.
"""

import contextlib
import io
import logging
from collections.abc import Callable

from gammabeta.errors import UnavailableError

from .harness import Case


def weightwatcher(case: Case) -> list[str]:
    """Warnings of weightwatcher 0.7 about the spectra of weights: "over-trained", "under-trained".

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        import weightwatcher as ww
    except ImportError as error:
        need = "pip install weightwatcher"
        raise UnavailableError(f"weightwatcher cannot be imported ({error}): {need}") from error
    logging.disable(logging.WARNING)  # it logs every layer
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            details = ww.WeightWatcher(model=case.model).analyze()
    finally:
        logging.disable(logging.NOTSET)
    return sorted({str(word) for word in details.get("warning", ()) if word}) if len(details) else []


OTHERS: dict[str, Callable[[Case], list[str]]] = {"weightwatcher": weightwatcher}
