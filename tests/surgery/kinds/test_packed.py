"""The kinds in float32, where what a fold gives is also packed, and layers take in what follows them."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch

import gammabeta as gb
from gammabeta.errors import SurgeryError, UsageError

from .all import KINDS
from .certainty import __name__ as CERTAINTY
from .harness import mapped, observed, same_effects

pytestmark = pytest.mark.filterwarnings("ignore")  # of the models' own code


def _single(tensor):
    return tensor.float() if tensor.dtype is torch.float64 else tensor


def _names():
    for name, kind in KINDS.items():
        quick = kind.build.__module__ == CERTAINTY and "Activation" in name
        yield pytest.param(name, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("name", [*_names()])
def test_fold_and_pack(name):
    kind = KINDS[name]
    if "fold" in kind.never:
        pytest.skip("there is nothing to fold")
    kind.reset()
    try:
        with kind.around():
            folded = gb.fold(kind.fresh().float(), mapped(kind.given(), _single), pack=True)
    except (SurgeryError, UsageError) as error:
        pytest.skip(f"refused: {error}")
    reference = kind.fresh().float()
    see = partial(observed, training=False, outside=kind.outside, gradients=False)
    for number, one in enumerate(kind.calls):
        if not one.fold:
            continue
        args, kwargs = mapped((one.args, one.kwargs), _single)
        one = replace(one, args=args, kwargs=kwargs)
        kind.reset()
        wanted = {k: v for k, v in see(reference, one).items() if k != "the error"}
        wanted = copy.deepcopy(mapped(wanted, torch.Tensor.detach))
        kind.reset()
        same_effects({"the error": None, **see(folded, one)}, {"the error": None, **wanted},
                     f"packed, call {number}", ["output"])  # fmt: skip
    kind.reset()
