"""Models of other libraries, with random weights, made healthy as their user would: recalibrated on the data.

They are taken as their libraries build them, a last γ of zero included.
"""

import contextlib
import math
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import gammabeta as gb
from gammabeta.errors import SurgeryError

from ..foreign.models import Foreign
from .cases import Given

LARGEST = 6_000_000  # parameters; larger ones only take longer
BATCH, BATCHES = 16, 2


class NotBuiltError(Exception):
    """A library cannot build one of its models with the packages that are installed."""


def forward(model: nn.Module, batch: Any) -> Any:
    """A batch of a foreign model holds all its inputs, positional or by keyword."""
    return model(**batch) if isinstance(batch, dict) else model(*batch)


def given(one: Foreign, most_values: float = math.inf) -> Given | None:
    """The model at the smallest size that runs; None where it is large, or runs on none.

    ``most_values``: that its batch norms normalise of a sample; a diagnosis takes the moments of all of them.

    Raises:
        ImportError: its library is not installed.
        NotBuiltError: it cannot build this one.
    """
    with contextlib.suppress(Exception), torch.device("meta"):  # some cannot be built there
        if _parameters(one.build()) > LARGEST:
            return None
    for size in one.sizes:
        model = _build(one)
        if _parameters(model) > LARGEST:
            return None
        try:
            values = _normalised(model.train(), one.inputs(2, size, 0)) / 2
        except Exception:  # other people's checks of sizes raise anything
            continue
        if values > most_values:
            return None
        loader = [one.inputs(BATCH, size, seed) for seed in range(BATCHES)]
        model = one.build()
        with contextlib.suppress(SurgeryError):  # it has no batch norm
            gb.recalibrate(model, loader, forward_fn=forward)
        return Given(model.eval(), loader, {"forward_fn": forward})
    return None


def _build(one: Foreign) -> nn.Module:
    torch.manual_seed(0)
    try:
        return one.build()
    except ImportError:
        raise
    except Exception as error:
        raise NotBuiltError(one.name) from error


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _normalised(model: nn.Module, batch: Any) -> int:
    """How many values the batch norms are given in a forward pass."""
    counts: list[int] = []
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(lambda _, given: counts.append(given[0].numel()))
    with torch.no_grad():
        forward(model, batch)
    return sum(counts)
