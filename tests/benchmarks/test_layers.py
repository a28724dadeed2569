"""The suite of layers: its cases, its gate, and the shared timing."""

import pytest
import torch

from benchmarks.harness import IncorrectError, timing
from benchmarks.suites import kernels
from gammabeta.functional import MaxPool


def test_every_program_runs_once_in_every_round():
    calls = []
    found = timing.interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=8, round_seconds=0
    )
    assert calls[:4] == ["a", "a", "b", "b"]  # two warm-up calls of each
    rounds = {"".join(calls[i : i + 2]) for i in range(4, len(calls), 2)}
    assert rounds == {"ab", "ba"}, "neither always follows the other"
    assert {name: t.rounds for name, t in found.items()} == {"a": 8, "b": 8}
    assert all(0 < t.lower <= t.median <= t.upper for t in found.values())


def small(operation: str) -> kernels.Case:
    case = next(c for c in kernels.cases(quick=True) if c.operation == operation and c.channels_last)
    return kernels.Case(
        operation,
        "small",
        (4, 6, 8, 10),
        True,
        case.activation,
        case.residual,
        case.pool,
        case.dtype,
        case.training,
    )


@pytest.mark.parametrize("operation", dict.fromkeys(c.operation for c in kernels.cases(quick=True)))
def test_gate_lets_right_results_through_and_stops_wrong_ones(operation, monkeypatch):
    layer = kernels.Layer(small(operation))
    layer.check()
    ours = kernels.Layer._ours
    monkeypatch.setattr(kernels.Layer, "_ours", lambda self: ours(self) * 1.1)
    with pytest.raises(IncorrectError, match="off by"):
        layer.check()


def test_cases_cover_both_layouts_and_more_than_the_last_cache():
    everything = kernels.cases(quick=False)
    assert {case.channels_last for case in everything} == {False, True}
    assert {case.dtype for case in everything} == {torch.float32, torch.bfloat16}
    assert any(case.nbytes > kernels._CACHE_BYTES for case in everything)
    assert len({case.title for case in everything}) == len(everything)


@pytest.mark.parametrize(
    ("channels_last", "settings", "passes"),
    [
        (False, {}, 5),
        (True, {}, 8),
        (False, {"training": False}, 2),
        (True, {"training": False}, 2),
        (False, {"residual": True}, 8),
        (True, {"residual": True}, 11),
        (False, {"pool": 2}, 3.5),
        (True, {"pool": MaxPool(3, 2, 1)}, 5.75),
    ],
)
def test_least_bytes(channels_last, settings, passes):
    case = kernels.Case("BN", "x", (2, 4, 6, 6), channels_last, **settings)
    assert kernels.least_bytes(case) == passes * 2 * 4 * 36 * 4


def test_a_row_tells_what_memory_allows():
    case = kernels.Case("BN", "x", (16, 64, 40, 40), False)
    seconds = {"torch": 8e-3, "ours": 2e-3, "copy": 1e-3, "apart": 1e-2}
    row = kernels._row(case, {name: timing.Timing(s, s, s, 1) for name, s in seconds.items()})
    # a copy of four tensors, read or written once each, took 1 ms: five passes would take 1.25
    assert row["memory allows"] == pytest.approx(8 / 1.25)
    assert (row["times faster"], row["than not in place"]) == (4, 5)
    assert "memory allows 6.40×; than torch not in place 5.00×" in kernels._summary([row])["BN"]
