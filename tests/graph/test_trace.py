"""A forward as a graph, and why some forwards are none."""

import operator

import pytest
import torch
from torch import Tensor, nn

from gammabeta.graph.trace import NotAGraph, is_torch_layer, module_of, trace, trace_always


class Outer(nn.Module):
    """A child with children, a keyword, and a sum in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.ReLU())

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        """Run (N, 3)."""
        y = self.inner(x)
        y += x
        return y * 2 if twice else y  # type: ignore[no-any-return]


def test_leaves_are_one_node_and_a_sum_in_place_stays_one() -> None:
    model = Outer()
    graph = trace(model, lambda _: True, given={"twice": True})
    targets = [node.target for node in graph.nodes]
    assert "inner" in targets
    assert operator.iadd in targets
    assert operator.mul in targets
    opened = trace(model, is_torch_layer, given={"twice": False})
    called = [module for node in opened.nodes if (module := module_of(node, model)) is not None]
    assert called == list(model.inner)


def test_contexts_are_refused_only_where_they_matter() -> None:
    class Quiet(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return x * 2

    trace(Quiet(), is_torch_layer)
    with pytest.raises(NotAGraph, match="enters a context"):
        trace(Quiet(), is_torch_layer, contexts=False)


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (lambda self, x: x if x.sum() > 0 else -x, "cannot be traced"),
        (lambda self, x: x * 2 if self.training else x, "differs between training and evaluation"),
        (lambda self, x: x * torch.rand(()).item(), "draws random numbers"),
        (lambda self, x: setattr(self, "last", 1) or x * 2, "changes attributes"),
    ],
)
def test_a_forward_that_is_not_always_the_same(forward, why) -> None:  # type: ignore[no-untyped-def]
    model: nn.Module = type("Model", (nn.Module,), {"forward": forward})()
    with pytest.raises(NotAGraph, match=why):
        trace_always(model, set())
    assert not hasattr(model, "last")
    assert model.training


def test_a_forward_that_cannot_be_seen() -> None:
    model = nn.Linear(2, 2)
    model.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(NotAGraph, match="replaced on the instance"):
        trace_always(model, set())
    with pytest.raises(NotAGraph, match="no forward"):
        trace_always(nn.Module(), set())
