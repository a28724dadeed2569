"""Restarts by ``torchrun --max-restarts``: which run to go on with.

When a worker dies, torchrun starts all of them again with the same command line. A run folder says which job
of torchrun began it, so that a restarted job goes on with its own interrupted run, and no other.
"""

from pathlib import Path
from typing import Any

from ..errors import RunError
from .provenance import torchrun_job
from .recipe import Recipe
from .run import Run


def begun_before(out: Path | None, recipe: Recipe, source: str, seed: int, holdout: int) -> Path | None:
    """Return the run that this very job began with the same settings before torchrun restarted it, if any.

    Args:
        out: The folder asked for; None: look through ``runs/``.
        recipe: The settings, and so the rest.
        source: The data set.
        seed: Of the run.
        holdout: Held-out images.
    """
    mine = torchrun_job()
    if mine is None:
        return None
    wanted = (recipe, source, seed, holdout)
    for path in [out] if out is not None else sorted(Path("runs").glob("*"), reverse=True):
        try:
            run = Run.open(path)
        except RunError:
            continue
        has = (run.recipe, run.info.data, run.info.seed, run.info.holdout)
        if has == wanted and _same_job(run.info.provenance.get("torchrun"), mine):
            return path
    return None


def _same_job(theirs: Any, mine: dict[str, str]) -> bool:
    if not isinstance(theirs, dict) or theirs.get("run_id") != mine["run_id"]:
        return False
    if theirs.get("host") == mine["host"]:
        return theirs.get("agent") == mine["agent"]
    return mine["run_id"] != "none"  # rank 0 has moved to another machine
