"""Models made to break surgery: the same results on every call, or one line that says why not.

Each kind stands for what a rewritten model can get wrong. Surgery leaves alone what it does not understand.
"""

import copy
import warnings

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

import gammabeta as gb
from benchmarks.foreign.watch import statistics
from gammabeta.errors import SurgeryError, UsageError
from gammabeta.graph.layers import unwrap

from .all import KINDS
from .harness import (
    STATISTICS,
    DifferentError,
    observed,
    random_states,
    same,
    same_effects,
    same_state,
    seed,
    unchanged,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of the models' own code


FILES = {kind.build.__module__.rpartition(".")[2] for kind in KINDS.values()}


def kinds(*files):
    """Every kind; those of other files are slow: their faults are of an operation with a test of its own."""

    def slow(kind):
        return kind.slow or kind.build.__module__.rpartition(".")[2] not in files

    named = [pytest.param(n, marks=[pytest.mark.slow] * bool(slow(k))) for n, k in KINDS.items()]
    return pytest.mark.parametrize("kind", named, indirect=True)


@pytest.fixture
def kind(request):
    one = KINDS[request.param]
    one.reset()
    yield one
    one.reset()


def check_refusal(kind, what, error):
    """A refusal is one line, and allowed."""
    assert str(error).strip()
    assert "\n" not in str(error)
    assert what not in kind.must, f"refused: {error}"


def operated(kind, what, operate, ran=True):
    """The result of an operation on a new model, or None where it was refused; the model is untouched.

    ``ran``: whether the operation may run the model.
    """
    model, reference = kind.fresh(), kind.fresh()
    kind.reset()
    outside = copy.deepcopy(kind.outside())
    seed(17)
    states = random_states()
    try:
        with kind.around(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = operate(model)
    except (SurgeryError, UsageError) as error:
        check_refusal(kind, what, error)
        result = None
    unchanged(model, reference, "the model given")
    if not ran:  # what a forward writes outside the model is its own affair
        same(kind.outside(), outside, "what the model keeps elsewhere")
    assert random_states() == states, "random numbers were drawn"
    return result


def every_call(kind, result, what, modes):
    """Make every call with a new model and with the one from surgery, and compare all that happened."""
    reference = kind.fresh()
    for mode in modes:
        for number, one in enumerate(kind.calls):
            where = f"{what}, call {number} in {'training' if mode else 'evaluation'}"
            kind.reset()
            wanted = observed(reference, one, mode, kind.outside)
            wanted["outside"] = copy.deepcopy(wanted["outside"])
            kind.reset()
            found = observed(result, one, mode, kind.outside)
            same_effects(found, wanted, where)
            same_state(result, reference, where, left=STATISTICS if kind.twice else ())


@kinds(*FILES - {"certainty"})  # which is of folds
@pytest.mark.parametrize("given", ["nothing", pytest.param("the example", marks=pytest.mark.slow)])
def test_convert(kind, given):
    if "convert" in kind.never:
        pytest.skip("there is nothing to convert")
    example = kind.given() if given == "the example" else None
    for modes in [(mode,) for mode in kind.modes] if kind.changing else [kind.modes]:
        result = operated(
            kind, "convert", lambda model: gb.convert(model, example=example), example is not None
        )
        if result is not None:
            assert list(result.state_dict()) == list(kind.fresh().state_dict())
            every_call(kind, result, "converted", modes)


@kinds("rewriting", "surgery_modes", "classes")  # the methods are rewritten as in test_convert
@pytest.mark.parametrize("to", ["frozen", pytest.param("ghost", marks=pytest.mark.slow)])
def test_convert_to_another_kind_in_evaluation(kind, to):
    """Other statistics in training, but the same in evaluation; what is fused is fused in the same way."""
    if "convert" in kind.never or False not in kind.modes:
        pytest.skip("there is nothing to convert")
    result = operated(kind, "", lambda model: gb.convert(model, to), ran=False)
    if result is None:
        return
    reference = kind.fresh()
    for number, one in enumerate(kind.calls):
        if one.fold:
            kind.reset()
            wanted = observed(reference, one, False, kind.outside)
            kind.reset()
            found = observed(result, one, False, kind.outside)
            same(found["raised"], wanted["raised"], f"{to}, call {number}, raised")
            with torch.no_grad():
                same(_values(found["output"]), _values(wanted["output"]), f"{to}, call {number}, output")


def _values(output):
    from .harness import _collect

    found = []
    _collect(output, found, set())
    return [tensor.detach() for tensor in found]


@kinds(*FILES - {"rewriting", "later"})  # no method is rewritten, and much that follows is not promised
def test_fold(kind):
    if "fold" in kind.never:
        pytest.skip("there is nothing to fold")
    result = operated(kind, "fold", lambda model: gb.fold(model, kind.given()))
    if result is None:
        return
    reference = kind.fresh()
    kept = {name for name, module in reference.named_modules() if not isinstance(module, _BatchNorm)}
    named = dict(result.named_modules())
    for number, one in enumerate(kind.calls):
        if not one.fold:
            continue
        where = f"folded, call {number}"
        kind.reset()
        wanted = observed(reference, one, False, kind.outside)
        wanted["outside"] = copy.deepcopy(wanted["outside"])
        kind.reset()
        found = observed(result, one, False, kind.outside)
        for what in ("output", "inputs"):  # a fold makes no promise about gradients of its weights
            found[what], wanted[what] = _detached(found[what]), _detached(wanted[what])
        same_effects(found, wanted, where, ["output", "inputs", "random states", "outside"])
        same_state(  # a fold is of the model inside its wrappers
            result,
            unwrap(reference),
            where,
            only=[n for n in kept if n == "" and n in named and not _own(result)],
        )


@pytest.mark.parametrize(
    "name", ["NeverCalled", "DomainNorms", "GetattrByName", "MatchStatement", "AuxiliaryHead"]
)
def test_fold_reports_every_norm(name):
    one = KINDS[name]
    reported = {layer.name for layer in gb.fold(one.fresh(), one.given()).fold_report.layers}
    assert reported == {n for n, m in one.fresh().named_modules() if isinstance(m, _BatchNorm)}


def _own(result):
    """Whether the whole model is one layer, which a fold may replace."""
    return not list(result.children())


def _detached(value):
    from .harness import mapped

    return mapped(value, lambda t: t.detach())


@kinds("callers", "state", "surgery_modes", "patched", "randomness", "classes", "weights")
def test_recalibrate(kind):
    if "recalibrate" in kind.never:
        pytest.skip("there is nothing to recalibrate")
    one = kind.calls[0]

    def forward(network, batch):
        return one(network, *copy.deepcopy(batch[0]), **copy.deepcopy(batch[1]))

    model, reference = kind.fresh(), kind.fresh()
    kind.reset()
    seed(3)
    wanted = statistics(kind.fresh(), lambda network: forward(network, (one.args, one.kwargs)))
    kind.reset()
    seed(17)
    states = random_states()

    try:
        with kind.around(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gb.recalibrate(model, [(one.args, one.kwargs)], forward_fn=forward)
    except (SurgeryError, UsageError) as error:
        check_refusal(kind, "recalibrate", error)
        unchanged(model, reference, "the model given")
        return
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
            twin = reference.get_submodule(name)
            mean, var = wanted.get(name, (twin.running_mean, twin.running_var))
            same(layer.running_mean, mean, f"recalibrated, {name}.running_mean")
            same(layer.running_var, var, f"recalibrated, {name}.running_var")
            with torch.no_grad():
                for buffer in STATISTICS:
                    getattr(layer, buffer).copy_(getattr(twin, buffer))
    for name, layer in model.named_modules():
        if isinstance(layer, torch.jit.ScriptModule):  # tests/stats/test_reach.py knows what is right there
            with torch.no_grad():
                for buffer, value in layer.named_buffers(recurse=False):
                    if buffer in STATISTICS:
                        value.copy_(getattr(dict(reference.named_modules())[name], buffer))
    unchanged(model, reference, "beside the statistics")
    assert random_states() == states, "random numbers were drawn"


def test_the_comparison_sees_a_difference():
    """The harness itself: another number, type, key or state is told."""
    with pytest.raises(DifferentError, match="off by"):
        same(torch.ones(2), torch.ones(2) * 1.01, "here")
    with pytest.raises(DifferentError, match="list where tuple"):
        same([1], (1,), "here")
    with pytest.raises(DifferentError, match="keys"):
        same({"a": 1}, {"b": 1}, "here")
    first, second = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    second.eps = 1.0
    with pytest.raises(DifferentError, match="eps"):
        unchanged(first, second, "here")
