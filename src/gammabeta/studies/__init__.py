"""Studies: claims about batch normalization, re-made at the scale of MNIST on a few cores.

One file a study, which is its method section. What they share is in ``study.py`` (what a study is),
``trial.py`` (data and training of one seed), ``pictures.py``, ``conduct.py`` (all seeds, one result) and
``report.py``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    from .study import Study

#: Each study's name, and one line for a list; no torch is needed to read it. The module is the name with _.
CATALOG = {
    "faster": "faster, and steadier inputs (Ioffe and Szegedy 2015)",
    "larger-steps": "larger steps, the more the deeper (Bjorck et al. 2018)",
    "landscape": "a smoother landscape (Santurkar et al. 2018)",
    "gradient-explosion": "gradients explode without training (Yang et al. 2019)",
    "ghost-batches": "ghosts mend large batches (Hoffer et al. 2017)",
    "evaluation-statistics": "exact statistics and running ones (Wu and Johnson 2021)",
    "domains": "statistics belong to their domain (Schneider et al. 2020)",
    "dropout-before": "dropout before it shifts the variance (Li et al. 2019)",
    "batches-of-two": "two examples a batch (Summers and Dinneen 2020)",
    "repair": "repair of a merged network (Jordan et al. 2023)",
    "regularization": "batch norm is regularisation (Luo et al. 2019)",
    "weight-decay": "weight decay without a scale (van Laarhoven 2017)",
}


def find(name: str) -> "Study":
    """Return a study by its name; ``UsageError`` if there is none."""
    if name not in CATALOG:
        raise UsageError(f"there is no study {name!r}: the names are {', '.join(CATALOG)}, or all")
    study: Study = import_module(f".{name.replace('-', '_')}", __name__).STUDY
    return study
