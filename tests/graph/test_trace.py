"""A forward as a graph, and why some forwards are none."""

import operator

import pytest
from torch import Tensor, nn

from gammabeta.graph.trace import NotAGraph, is_torch_layer, module_of, trace


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


def test_leaves_are_one_node() -> None:
    model = Outer()
    graph = trace(model, lambda _: True, given={"twice": True})
    targets = [node.target for node in graph.nodes]
    assert "inner" in targets
    assert operator.mul in targets
    opened = trace(model, is_torch_layer, given={"twice": False})
    called = [module for node in opened.nodes if (module := module_of(node, model)) is not None]
    assert called == list(model.inner)


def test_a_forward_that_decides_on_values_is_none() -> None:
    class Decides(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(NotAGraph, match="cannot be traced"):
        trace(Decides(), is_torch_layer)
