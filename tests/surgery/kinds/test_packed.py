"""The kinds in float32, where what a fold gives is also packed, and layers take in what follows them."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import gammabeta as gb
from gammabeta.errors import SurgeryError, UsageError

from . import harness
from .all import KINDS
from .certainty import __name__ as CERTAINTY
from .harness import mapped, observed, same_effects

pytestmark = pytest.mark.filterwarnings("ignore")  # of the models' own code


def _single(tensor):
    return tensor.float() if tensor.dtype is torch.float64 else tensor


def _kept(tensor):
    """As it is now, without a graph: both models' outputs."""
    return tensor.detach().clone()


def _names():
    for name, kind in KINDS.items():
        quick = kind.build.__module__ == CERTAINTY and "Activation" in name
        yield pytest.param(name, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("name", [*_names()])
def test_fold_and_pack(name, monkeypatch):
    monkeypatch.setattr(harness, "TOLERANCE", 1e-4)  # whatever the type of a number, it was a float32
    kind = KINDS[name]
    if "fold" in kind.never:
        pytest.skip("there is nothing to fold")
    if name == "NoiseAdded":
        pytest.skip("what a packed convolution gives lies channels_last: noise drawn like it does, too")
    kind.reset()
    try:
        with kind.around():
            reference, given = kind.fresh().float(), mapped(kind.given(), _single)
            folded = gb.fold(kind.fresh().float(), given, pack=True)
    except (SurgeryError, UsageError) as error:
        pytest.skip(f"refused: {error}")
    see = partial(observed, training=False, outside=kind.outside, gradients=False)
    for number, one in enumerate(kind.calls):
        if not one.fold:
            continue
        args, kwargs = mapped((one.args, one.kwargs), _single)
        one = replace(one, args=args, kwargs=kwargs)
        kind.reset()
        wanted = mapped(see(reference, one), _kept)
        kind.reset()
        found = mapped(see(folded, one), _kept)
        same_effects(
            {**found, "the error": None}, {**wanted, "the error": None}, f"packed, call {number}", ["output"]
        )
    kind.reset()
