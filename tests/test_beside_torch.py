"""Some thousand random calls: never farther from the float64 truth than twice torch's error and a floor.

The floor of each result, channel by channel, is ``FLOOR`` (of sums ``SUM``) times the sizes of the terms that
its equation adds up, ``VARIANCE`` times the running variance, and one unit in the last place of what is
stored in bfloat16.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gammabeta.epilogue import Epilogue, MaxPool
from gammabeta.functional import batch_norm
from gammabeta.kernels.backend import Call
from gammabeta.kernels.cpu import host, plan
from tests import oracle
from tests.random_cases import ALL, QUICK, Case, case_of

FLOOR = 8 * 2.0**-23  # roundings of the largest term in float32
SUM = 2 * 2.0**-23  # the same of a sum over a channel, against the sum of absolute values
VARIANCE = 8 * 2.0**-23
LEAST = 1e-36  # below the normal numbers of float32 and bfloat16 a processor may round to zero
UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}
PART = 175  # cases of one test


class Guards:
    """Memory for all that the kernels write, each block between bytes that must stay as they are."""

    def __init__(self) -> None:
        self.blocks: list[tuple[Tensor, int, int]] = []

    def block(self, nbytes: int) -> Tensor:
        """So many bytes, every one 255: as floating-point numbers NaN."""
        whole = torch.full((nbytes + 192,), 255, dtype=torch.uint8)
        start = 64 + -whole.data_ptr() % 64
        self.blocks.append((whole, start, start + nbytes))
        return whole[start : start + nbytes]

    def tensor(self, like: Tensor) -> Tensor:
        """A tensor of this shape, layout and dtype (``like`` is on the device ``meta``)."""
        return self.block(like.numel() * like.itemsize).view(like.dtype).as_strided(like.shape, like.stride())

    def workspace(self, nbytes: int) -> int:
        return self.block(nbytes).data_ptr()

    def assert_untouched(self) -> None:
        for whole, start, stop in self.blocks:
            assert (whole[:start] == 255).all(), "bytes before a tensor were written"
            assert (whole[stop:] == 255).all(), "bytes behind a tensor were written"


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guards]:
    """Every call goes to the kernels, is cut for its threads, and writes between guards."""
    found = Guards()
    originals = {name: getattr(host, name) for name in ("empty", "_channelwise")}
    for name in ("SMALL_TRAIN", "SMALL_EVAL"):
        monkeypatch.setattr(f"gammabeta.functional.step.{name}", [0, 0, 0])
    monkeypatch.setattr(plan, "_GRAIN", 1024)
    monkeypatch.setattr(host, "empty_like", lambda x: found.tensor(torch.empty_like(x, device="meta")))
    for name, original in originals.items():
        monkeypatch.setattr(host, name, lambda *args, make=original: found.tensor(make(*args)))
    monkeypatch.setattr(host, "_workspace", found.workspace)
    host._program.cache_clear()
    yield found
    host._program.cache_clear()


# --- one case ---------------------------------------------------------------------------------------------


def bytes_of(t: Tensor) -> Tensor:
    """All of the memory that the tensor is a part of."""
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())  # type: ignore[call-overload]


def worst(t: Tensor) -> Tensor:
    """The largest absolute value of each channel."""
    return t.double().abs().flatten() if t.dim() == 1 else t.double().abs().movedim(1, 0).flatten(1).amax(1)


def floors(case: Case, true: oracle.Outcome) -> dict[str, Tensor]:
    """What each channel of each result may be off, whatever torch does."""
    call, given = oracle.exact(case.call), None if case.training else case.running
    mean, var = oracle.statistics(call.x) if given is None else (given[0].double(), given[1].double())
    invstd, grad = (var + call.eps).rsqrt(), case.grad.double()
    spread = worst(call.x - mean.view(-1, *[1] * (call.x.dim() - 2))) + mean.abs()
    slope = invstd if call.weight is None else call.weight.abs() * invstd
    reach = 1 + slope * spread
    for added in (call.bias, call.residual):
        reach = reach if added is None else reach + worst(added)
    per_channel = reach * grad.abs().movedim(1, 0).flatten(1).sum(1)
    largest = reach * worst(grad)
    found = {
        "out": reach, "dx": slope * largest * (1 + invstd * spread), "dresidual": largest,
        "dbias": per_channel, "dweight": per_channel * invstd * spread,
    }  # fmt: skip
    unit = UNIT[case.call.x.dtype]
    stored = {name: unit * worst(getattr(true, name)) for name in ("out", "dx")}
    if true.dresidual is not None:
        stored["dresidual"] = unit * worst(true.dresidual)
        # The second backward pass takes dz from where the residual's gradient was stored.
        stored["dx"] = stored["dx"] + slope * stored["dresidual"]
    share = {"dbias": SUM, "dweight": SUM}
    return {
        name: LEAST + share.get(name, FLOOR) * floor + stored.get(name, 0.0) for name, floor in found.items()
    }


def running_floors(case: Case, after: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    mean, var = oracle.statistics(case.call.x)
    return LEAST + SUM * (case.running[0].abs() + mean.abs() + var.sqrt()), LEAST + VARIANCE * after[1]


def running_after(case: Case) -> tuple[Tensor, Tensor]:
    """The running statistics by Algorithm 2, in float64."""
    mean, var = oracle.statistics(case.call.x)
    count = case.call.x.numel() // case.call.x.shape[1]
    new, share = (mean, var * (count / (count - 1))), case.momentum
    return tuple((1 - share) * old.double() + share * n for old, n in zip(case.running, new, strict=True))  # type: ignore[return-value]


def results(case: Case, function: object) -> tuple[oracle.Outcome, tuple[Tensor, Tensor]]:
    """Output, gradients and running statistics after the call by ``function(call, running)``."""
    running = case.running[0].clone(), case.running[1].clone()
    found = oracle.differentiate(lambda call, _: function(call, running), case.call, case.grad, None)  # type: ignore[operator]
    return found, running


def ratios(case: Case, guards: Guards) -> dict[str, float]:
    """Of each result, the greatest error over the budget of its channel; at most 1 is right."""
    torch.set_num_threads(case.threads)
    training, momentum = case.training, case.momentum

    def ours(call: Call, running: tuple[Tensor, Tensor]) -> Tensor:
        activation, pool = call.epilogue
        return batch_norm(
            call.x, *running, call.weight, call.bias, training, momentum, call.eps,
            activation=activation, residual=call.residual, pool=pool,
        )  # fmt: skip

    def torchs(call: Call, running: tuple[Tensor, Tensor]) -> Tensor:
        z = torch.nn.functional.batch_norm(
            call.x, *running, call.weight, call.bias, training, momentum, call.eps
        )
        return call.epilogue.apply(z, call.residual)

    given = [t for t in (*case.call[:4], case.grad) if t is not None]
    before = [bytes_of(t).clone() for t in given]
    mine, my_running = results(case, ours)
    assert all(torch.equal(bytes_of(t), old) for t, old in zip(given, before, strict=True)), (
        "an input changed"
    )
    guards.assert_untouched()
    theirs, their_running = results(case, torchs)
    true = oracle.truth(case.call, case.grad, None if training else case.running)
    allowed, found = floors(case, true), {}
    for name, floor in allowed.items():
        exact = getattr(true, name)
        if exact is not None:
            found[name] = _ratio(getattr(mine, name), exact, getattr(theirs, name), floor)
    if training:
        after = running_after(case)
        both = zip(my_running, after, their_running, running_floors(case, after), strict=True)
        found["running mean"], found["running variance"] = (_ratio(*four) for four in both)
    guards.blocks.clear()
    return found


def _ratio(mine: Tensor, exact: Tensor, theirs: Tensor, floor: Tensor) -> float:
    assert mine.shape == exact.shape
    error, torchs = worst(mine.double() - exact), worst(theirs.double() - exact)
    torchs = torchs.nan_to_num(math.inf)  # where torch has no answer, any is as good
    return float((error / (2 * torchs + floor)).nan_to_num(math.inf).max())


# --- all of them ------------------------------------------------------------------------------------------


# What the default run draws: each is ten kernels to compile, and other default tests need them too.
COMPILED = {
    (Epilogue(), torch.float32, False),
    (Epilogue("relu"), torch.float32, False),
    (Epilogue("relu"), torch.float32, True),
    (Epilogue("relu"), torch.bfloat16, True),
    (Epilogue("relu", 2), torch.float32, False),
    (Epilogue("relu", MaxPool(3, 2, 1)), torch.float32, False),
}


def test_random_calls_of_common_kinds_are_within_twice_torchs_error(guards):
    for seed in range(6 * PART):
        case = case_of(seed, QUICK)
        call = case.call
        if (call.epilogue, call.x.dtype, call.residual is not None) in COMPILED:
            for name, ratio in ratios(case, guards).items():
                assert ratio <= 1, f"{name} of seed {seed} ({case.values}): {ratio:.3g} of its budget"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(12))
def test_random_calls_are_within_twice_torchs_error(part, guards):
    for seed in range(part * PART, (part + 1) * PART):
        case = case_of(seed, QUICK)
        for name, ratio in ratios(case, guards).items():
            assert ratio <= 1, f"{name} of seed {seed} ({case.values}): {ratio:.3g} of its budget"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_a_hundred_thousand_more(part, guards):
    for seed in range(10**6 + part * 5000, 10**6 + (part + 1) * 5000):
        case = case_of(seed, ALL)
        for name, ratio in ratios(case, guards).items():
            assert ratio <= 1, f"{name} of seed {seed} ({case.values}): {ratio:.3g} of its budget"
