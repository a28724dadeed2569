"""The suite of layers: its cases, its gate, and the shared timing."""

import pytest
import torch

from gammabeta import bench
from gammabeta.bench import kernels, timing


def test_every_program_runs_once_in_every_round():
    calls = []
    found = timing.interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4, round_seconds=0
    )
    assert calls == ["a", "a", "b", "b", "a", "b", "b", "a", "a", "b", "b", "a"]  # two warm-up calls of each
    assert {name: t.rounds for name, t in found.items()} == {"a": 4, "b": 4}
    assert all(0 < t.lower <= t.median <= t.upper for t in found.values())


def test_geometric_mean_of_opposites_is_one():
    assert timing.geometric_mean([0.5, 2.0]) == pytest.approx(1)


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
    with pytest.raises(bench.IncorrectError, match="off by"):
        layer.check()


def test_cases_cover_both_layouts_and_more_than_the_last_cache():
    everything = kernels.cases(quick=False)
    assert {case.channels_last for case in everything} == {False, True}
    assert {case.dtype for case in everything} == {torch.float32, torch.bfloat16}
    assert any(case.nbytes > kernels._CACHE_BYTES for case in everything)
    assert len({case.title for case in everything}) == len(everything)


@pytest.mark.parametrize(
    ("channels_last", "training", "passes"),
    [(False, True, 5), (True, True, 8), (False, False, 2), (True, False, 2)],
)
def test_least_bytes(channels_last, training, passes):
    case = kernels.Case("BN", "x", (2, 4, 3, 3), channels_last, training=training)
    assert kernels.least_bytes(case) == passes * 2 * 4 * 9 * 4
